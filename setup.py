"""The packages of the wheel. ``pyproject.toml`` cannot add a folder (configs) to the packages that it finds."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["relvit_d2", "relvit_d2.*"]), "relvit_d2.configs"],
    package_dir={"relvit_d2.configs": "configs"},
)
