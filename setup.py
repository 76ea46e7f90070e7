"""What setup.cfg cannot say: callbacks and configs stand beside the package in a checkout and inside it in an installation."""

from setuptools import find_packages, setup

BESIDE = {"lit_opd.callbacks": "callbacks", "lit_opd.configs": "configs"}

setup(packages=[*find_packages(include=["lit_opd*"]), *BESIDE], package_dir=BESIDE)
