"""The packages: configs/ and tasks/ lie beside `lkda` in a checkout, and inside it in a wheel."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["lkda*"]), "lkda.configs", "lkda.tasks"],
    package_dir={"lkda.configs": "configs", "lkda.tasks": "tasks"},
)
