"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "backends" / "emitter" / "README.md"
EXAMPLES = (
    re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    if README.exists()
    else []
)
SAYS = [
    "demo/room/ hello\n['me']\n",
    "rw\n",
    "chat/one one hello 1\n['hello']\nrejected\n",
]


@pytest.mark.skipif(not README.exists(), reason="looks at the checkout")
@pytest.mark.parametrize("number", range(len(SAYS)))
def test_an_example_of_the_readme_says_what_it_should(number: int) -> None:
    assert len(EXAMPLES) == len(SAYS)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number]],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # The broker's log says why it refused something, which is the point of one example.
    said = re.sub(r"127\.0\.0\.1:\d+", "PEER", done.stderr)
    wanted = "refused publish of PEER: the key has no w permission\n" if number == 2 else ""
    assert (done.stdout, said) == (SAYS[number], wanted)
