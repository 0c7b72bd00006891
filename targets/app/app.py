#!/usr/bin/env python3
"""Sample app: classify the images named on the command line, with the model loaded once.

    python3 app/app.py photo.jpg another.jpg

It needs run.py and edgekd.json of this bundle beside it (one folder up), numpy, Pillow and the bundle's runtime.
"""

import os
import sys

import numpy as np

BUNDLE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
sys.path.insert(0, BUNDLE)

import run  # noqa: E402 - the bundle's own run.py


def main() -> None:
    manifest = run.read_manifest()
    infer, runtime, _ = run.load(manifest, *run.choose_model(manifest, None, None), threads=1)
    height, width, channels = run.image_layout(manifest)
    sys.stdout.write(f"{manifest['name']} on {runtime}\n")
    for path in sys.argv[1:]:
        image = run.read_image(path, height, width, channels)  # uint8, resized; from a camera: any such array
        logits = infer(run.prepared(manifest, image[None]))[manifest["outputs"][0]["name"]][0]
        best = int(np.argmax(logits))
        sys.stdout.write(f"{path}: {manifest['labels'][best]} ({run.softmax(logits)[best]:.3f})\n")


if __name__ == "__main__":
    main()
