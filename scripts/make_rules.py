"""Meta-train the bundled rules: five of the recipes', from fixed seeds and budgets in inner steps.

    python scripts/make_rules.py --data-dir DIR [NAME ...]

DIR holds the whole MNIST (a folder `mnist`), or leave it out to take it from the hub. Interrupted
runs continue where they were. The files go to src/stepsmith/data/rules/.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from stepsmith.hub import BUNDLED
from stepsmith.recipes import FULL, Study
from stepsmith.recipes.paper_a.rules import learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BUNDLED)}")
    parser.add_argument("--data-dir")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--out", type=Path, default=Path("src/stepsmith/data/rules"))
    parser.add_argument("--threads", type=int, default=1, help="decides the last digits")
    chosen = parser.parse_args()
    if odd := [name for name in chosen.names if name not in BUNDLED]:
        parser.error(f"no rule {odd[0]!r}; there are {', '.join(BUNDLED)}")
    torch.set_num_threads(chosen.threads)
    logging.basicConfig(format="%(message)s")
    study = Study("rules", FULL, chosen.cache, data_dir=chosen.data_dir, say=print)
    for name in chosen.names or BUNDLED:
        trained = learned(study, name)
        print(trained.save(chosen.out / f"{name}.safetensors"), trained.manifest["validation"])


if __name__ == "__main__":
    main()
