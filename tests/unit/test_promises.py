from __future__ import annotations

from nxdi_expertscale.families.unsupported import UNSUPPORTED
from tests.upstream import promises


def test_every_upstream_module_that_the_package_names_is_recorded() -> None:
    of_unsupported_models = {model.module for model in UNSUPPORTED}
    recorded = str(promises.recorded(promises.newest())).replace(":", ".")

    named = promises.modules_of_upstream() - of_unsupported_models

    assert [name for name in sorted(named) if name not in recorded] == []
