from __future__ import annotations

import json

from click.testing import CliRunner

from nxdi_expertscale.cli import cli


def test_demo_shows_what_a_shared_scale_costs() -> None:
    result = CliRunner().invoke(cli, ["demo", "--json"])

    layers = json.loads(result.stdout)["layers"]
    assert result.exit_code == 0
    assert max(layer["expert_wise"] for layer in layers) < 0.06
    assert min(layer["averaged"] for layer in layers) > 0.5
