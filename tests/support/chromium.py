"""Pages in a headless Chromium, with a script that acts like a user and writes what it observes into the document."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

_HARNESS = """
<script>
const press = (key, target = document.body) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", async () => {
  let observed;
  try { observed = await (async () => { %s })(); } catch (error) { errors.push(String(error)); }
  const element = document.createElement("pre");
  element.id = "observed";
  element.textContent = btoa(String.fromCharCode(...new TextEncoder().encode(JSON.stringify({observed, errors}))));
  document.documentElement.append(element);
});
</script>
"""


def run_in_page(page: Path, script: str) -> Any:
    """Return the value that the script's function body returns in a copy of the page; `press(key)` presses a key."""
    import base64

    copy = page.with_name(f"test_{page.name}")
    # in the head, so that errors of the page's own script are seen
    text = page.read_text(encoding="utf-8").replace("</head>", _HARNESS % script + "</head>", 1)
    copy.write_text(text, encoding="utf-8")
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options = [
        f"--user-data-dir={page.parent / 'browser'}",
        "--virtual-time-budget=5000",
        "--window-size=1200,900",
    ]
    result = subprocess.run(
        [*command, *options, copy.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    encoded = result.stdout.partition('<pre id="observed">')[2].partition("</pre>")[0]
    assert encoded, f"the script did not finish: {result.stderr[-2000:]}"
    content = json.loads(base64.b64decode(encoded))
    assert content["errors"] == []
    return content["observed"]
