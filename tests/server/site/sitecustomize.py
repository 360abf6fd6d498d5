"""Run by every interpreter that has this folder on its path: a host with a Neuron device."""

from tests.harness import standins
from tests.server import device

standins.install()
device.install()
