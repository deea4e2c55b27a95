"""The packages of the wheel; everything else is in ``pyproject.toml``, which cannot add a folder to those found."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["relvit_d2", "relvit_d2.*"]), "relvit_d2.configs"],
    package_dir={"relvit_d2.configs": "configs"},
)
