"""What the wheel holds beside the package. An editable install links to the checkout, which has these files itself."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class FilesOfTheWheel(BuildHookInterface[Any]):
    """Adds the files of pyproject.toml's table `hooks.custom.files` to a wheel, and none to an editable install.

    Hatchling's own table `force-include` would copy them into site-packages in both cases.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"].update(self.config["files"])
