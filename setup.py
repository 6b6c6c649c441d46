"""What pyproject.toml cannot say: csrc/ is compiled at its first use, so it is installed inside videor1_kernels."""

from setuptools import find_packages, setup

found = find_packages(include=["videor1", "videor1.*", "videor1_kernels", "videor1_kernels.*"])
setup(packages=[*found, "videor1_kernels.csrc"])
