"""Library examples of the README."""

import re

from tests.support.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text()

FIRST, INFERENCE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
"""Training in ten lines, and generation with what they save."""
