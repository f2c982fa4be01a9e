"""The votes of blind comparisons: files that blind_ab.html lets the user download, put beside the report. Imports no torch."""

import json
from pathlib import Path
from typing import NamedTuple

PATTERN = "votes*.json"


class BlindVotes(NamedTuple):
    """The result of one blind comparison of two columns of the gallery."""

    compared: tuple[str, str]
    wins: tuple[int, int]
    """Votes for each of them."""
    ties: int
    p_value: float
    """Of the two-sided sign test that both are equally good; ties do not count."""

    def describe(self) -> str:
        """Return the result as a sentence."""
        (first, second), (wins, losses) = self.compared, self.wins
        return f"{first} was preferred {wins} times, {second} {losses} times, {self.ties} equal (p = {self.p_value:.2g}, sign test)."


def read_votes(folder: Path, identity: str) -> list[BlindVotes]:
    """Return the votes in `folder` on the evaluation `identity`, by file name; files of another evaluation or form are ignored."""
    found = []
    for path in sorted(folder.glob(PATTERN)):
        try:
            content = json.loads(path.read_bytes())
            if content["report"] != identity:
                continue
            first, second = (str(column["label"]) for column in content["compared"])
            wins, losses = (int(count) for count in content["wins"])
            found.append(
                BlindVotes((first, second), (wins, losses), int(content["ties"]), float(content["p_value"]))
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
