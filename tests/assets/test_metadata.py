"""The metadata value of a model card embeds the images that are stored beside the card."""

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from assets.metadata import MAX_CARD_IMAGE_BYTES, model_card

CARD = """---
tags: [lora]
widget:
- text: a star
  output:
    url: images/star.png
---

# zorp

<Gallery />

![base beside LoRA](gallery.png)

```python
"![not an image](gallery.png)"
```

![loss](plots/loss.png) and ![away](https://example.org/a.png), [lineage.json](lineage.json), [home](https://example.org).

![secret](../secret.png) ![absent](absent.png)
"""


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def test_model_card_images_beside_it_are_embedded_and_bounded(tmp_path: Path):
    folder = tmp_path / "release"
    for number, name in enumerate(("gallery.png", "plots/loss.png", "../secret.png")):
        write_image(folder / name, number)
    (folder / "lineage.json").write_text("{}")
    (folder / "README.md").write_text(CARD)

    text = str(model_card(folder / "README.md").value)

    images = dict(re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text))
    for alt in ("base beside LoRA", "loss"):
        jpeg = base64.b64decode(images[alt].removeprefix("data:image/jpeg;base64,"))
        assert len(jpeg) <= MAX_CARD_IMAGE_BYTES
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.format == "JPEG"
    assert images["away"] == "https://example.org/a.png"
    assert images["not an image"] == "gallery.png", "code is not changed"
    assert images["secret"] == "../secret.png", "nothing outside the folder is read"
    assert "[home](https://example.org)" in text
    assert "`lineage.json`" in text
    assert "](lineage.json)" not in text
    assert "<Gallery />" not in text
    assert "tags:" not in text
    assert (folder / "README.md").read_text() == CARD
