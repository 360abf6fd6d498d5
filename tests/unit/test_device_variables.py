"""The environment variables for FP8 on the device."""

from __future__ import annotations

import logging
import os

import pytest

from nxdi_expertscale.settings import device_variables


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in device_variables.VARIABLES:
        # Set first, so that what the test sets is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_unset_variables_are_set_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nxdi_expertscale")

    device_variables.set_variables()
    device_variables.set_variables()

    assert [os.environ[name] for name in device_variables.VARIABLES] == ["1", "1"]
    assert caplog.messages == ["set XLA_HANDLE_SPECIAL_SCALAR=1, UNSAFE_FP8FNCAST=1 for FP8"]


@pytest.mark.parametrize("value", ["0", "", "false"])
def test_conflicting_variable_is_left_with_a_warning(
    caplog: pytest.LogCaptureFixture, value: str
) -> None:
    os.environ["UNSAFE_FP8FNCAST"] = value

    device_variables.set_variables()

    assert os.environ["UNSAFE_FP8FNCAST"] == value
    (line,) = caplog.messages
    assert f"UNSAFE_FP8FNCAST={value!r}" in line
