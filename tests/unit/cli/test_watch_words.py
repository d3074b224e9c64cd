"""The texts that the terminal and the page share."""

import json
import shutil
import subprocess

import pytest

from gateway.cli.watch import words
from tests.docs.markdown import ROOT

NODE = shutil.which("node")
SECONDS = [0, 0.9, 1, 25, 59, 60, 67, 299, 300, 329, 330, 390, 3569, 3570, 3600, 3725, 7200, 172799, 360000]

TROUBLES = [
    "no credentials",
    "draining",
    "upstream: upstream-open",
    "upstream: a-new-code",
    "store: no connection: refused",
    "the next key pair is refused",
]


def test_clock() -> None:
    """Minutes and seconds, with hours if there are any; rounded down."""
    shown = [words.clock(seconds) for seconds in (-1, 0, 7.9, 67, 3599, 3600, 3667, 360000)]
    assert shown == ["0:00", "0:00", "0:07", "1:07", "59:59", "1:00:00", "1:01:07", "100:00:00"]


@pytest.mark.skipif(NODE is None, reason="Node is not installed; .ci/run installs it")
def test_page_and_terminal_say_the_same() -> None:
    """An age, a task that is nearly done, and the troubles of the gateway have the same words in both."""
    script = f"""
    import * as words from {json.dumps((ROOT / "gateway/api/web/words.js").as_uri())};
    const ages = {json.dumps(SECONDS)}.map(words.ago);
    const troubles = {json.dumps(TROUBLES)}.map(words.troubleText);
    console.log(JSON.stringify([...ages, words.timeLeft(0.5), ...troubles]));
    """
    ran = subprocess.run(
        [NODE or "node", "--input-type=module", "--eval", script], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == [
        *map(words.ago, SECONDS),
        words.time_left(0.5),
        *map(words.trouble_text, TROUBLES),
    ]
