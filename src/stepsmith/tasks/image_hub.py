"""Sets on the Hugging Face hub, images above all, through the `datasets` library."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepsmith.tasks.image_files import (
    DataError,
    DataNotFound,
    Split,
    decode_all,
    one_line,
    table_rows,
)

PROBE_SECONDS = 3.0  # how long to wait for the hub's first answer


class HubUnavailable(DataNotFound):
    """The hub, or the set on it, cannot be had here: ``source="auto"`` goes on to the sample."""


@dataclass(frozen=True)
class Known:
    """A set known by a short name: its repository and columns on the hub, and its classes."""

    hub_id: str
    image: str
    label: str
    classes: tuple[str, ...] | None  # None: only the files know


_DIGITS = tuple("0123456789")
# fmt: off
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer",
            "dog", "frog", "horse", "ship", "truck")
# fmt: on
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
KNOWN = {
    "mnist": Known("ylecun/mnist", "image", "label", _DIGITS),
    "fashion_mnist": Known("zalando-datasets/fashion_mnist", "image", "label", _FASHION),
    "kmnist": Known("tanganke/kmnist", "image", "label", _KANA),
    "cifar10": Known("uoft-cs/cifar10", "img", "label", _CIFAR10),
    "cifar100": Known("uoft-cs/cifar100", "img", "fine_label", None),
}


def read_hub(name: str) -> tuple[str, Split, Split]:
    """The origin, the training and the test split of a known set or of ``owner/name``.

    Raises:
        HubUnavailable: not installed, not reachable, or no such set.
        DataError: the set is no set of labelled images.
    """
    if name not in KNOWN and "/" not in name:
        raise HubUnavailable(f"{name}: no hub set of this name is known; pass OWNER/NAME")
    spec = KNOWN.get(name)
    origin, train, test = hub_splits(name, spec.hub_id if spec else name)
    import datasets

    features = train.features
    image = spec.image if spec else _hub_column(features, datasets.Image)
    label = spec.label if spec else _hub_column(features, datasets.ClassLabel)
    if label is None and getattr(features.get("label"), "dtype", "").startswith(("int", "uint")):
        label = "label"
    if image not in features or label not in features:
        have = ", ".join(f"{k}: {type(v).__name__}" for k, v in features.items())
        raise DataError(
            f"{origin}: needs a column of type Image and one of type ClassLabel (or integers "
            f"called label), has {have}"
        )
    classes = getattr(features[label], "names", None)

    def read(part: Any) -> Split:
        where = f"{origin} {part.split}"
        table = part.with_format("arrow")[:]  # encoded bytes: nothing is decoded here
        rows, labels = table_rows(where, table, str(image), str(label), Path())
        return decode_all(rows, where), labels, classes

    return origin, read(train), read(test)


def hub_splits(name: str, hub_id: str, revision: str | None = None) -> tuple[str, Any, Any]:
    """The origin, the training and the test `datasets.Dataset` of a set of any kind on the hub.

    Args:
        name: what the set was asked for as, for errors.
        hub_id: its repository, ``owner/name``.
        revision: its branch, where that is not the main one.

    Raises:
        HubUnavailable: not installed, not reachable, or no such set.
        DataError: the set has no training or no test split.
    """
    try:
        import datasets
    except ImportError:
        reason = "package datasets is not installed"
        raise HubUnavailable(f"{name}: {reason}; pip install datasets") from None
    origin = f"hub:{hub_id}"
    splits = _prepared_before(hub_id)
    if splits is None:
        if reason := _hub_out_of_reach():
            raise HubUnavailable(f"{name}: {reason}; connect or use a directory")
        try:
            splits = datasets.load_dataset(hub_id, revision=revision)
        # What a hub, a proxy or a broken repository can raise is open-ended.
        except Exception as error:
            reason = f"hub set {hub_id} did not load ({one_line(error)})".replace(";", ",")
            raise HubUnavailable(f"{name}: {reason}; use a directory") from error
    test = next((s for s in ("test", "validation", "valid") if s in splits), None)
    if "train" not in splits or test is None:
        raise DataError(f"{origin}: needs splits train and test (or validation), has {[*splits]}")
    return origin, splits["train"], splits[test]


def _hub_column(features: Any, kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _prepared_before(hub_id: str) -> Any:
    """The set as `datasets` prepared it on this disk earlier, or None; asks no network.

    `load_dataset` finds it too, but where the network is down only after 20 seconds of retries.
    """
    try:
        from datasets.packaged_modules.cache.cache import Cache

        short = hub_id.split("/")[-1]
        return Cache(repo_id=hub_id, dataset_name=short, version="auto", hash="auto").as_dataset()
    # Nothing there, several configurations, or another release of `datasets`: ask the hub.
    except Exception:
        return None


def _hub_out_of_reach() -> str | None:
    """Why the hub cannot be asked, or None where it answers within `PROBE_SECONDS`."""
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    off = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if off or constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    outcome = [f"no answer within {PROBE_SECONDS:g} s"]

    def probe() -> None:
        try:  # the hub client's own session, so with its proxies and certificates
            status = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code
            outcome[0] = f"status {status}" if status >= 500 else ""
        except Exception as error:
            outcome[0] = one_line(error).replace(";", ",")

    # In a thread, since looking up a host name obeys no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return f"hub {constants.ENDPOINT} not reachable ({outcome[0]})" if outcome[0] else None
