"""The data sets' public homes: fetched with a checksum, resumed where they were cut, and turned into parquet.

Where the sums come from: IMDb's sha256 is in Hugging Face's and scikit-learn users' fetchers, torchtext pins its md5
(7c2ac02c...); AG News's two files have the md5 sums that torchtext pins (b1a00f82..., d52ea96a...); those of the SMS
archive and of its member are stated by several independent users of UCI's copy; tiktoken pins GPT-2's.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import WorkError, shown
from fastlora.files import sha256

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row without any progress
PAUSE = 1.0  # seconds before the second attempt; doubled each time


@dataclass(frozen=True)
class Remote:
    """A file on the network: where it is, and the checksum and the bytes that it must have."""

    url: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """What the file is called here."""
        return self.url.rsplit("/", 1)[-1]


_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SOURCES: dict[str, tuple[Remote, ...]] = {
    "imdb": (
        Remote(
            "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
            "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
            84_125_825,
        ),
    ),
    "ag_news": (
        Remote(_AG_NEWS + "train.csv", "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e", 29_470_338),
        Remote(_AG_NEWS + "test.csv", "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699", 1_857_427),
    ),
    "spam": (
        Remote(
            "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
            "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
            203_415,
        ),
    ),
    "gpt2": (
        Remote(_GPT2 + "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", 1_042_301),
        Remote(_GPT2 + "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", 456_318),
    ),
}


def fetch(name: str, folder: Path) -> None:
    """Make the files of data set `name` in `folder`, unless they are there, from its public home.

    Several processes may ask at once: one works, the others wait and find the files. What a run that was killed had
    fetched is used.

    Raises:
        WorkError: the network or the data failed; the message says which file, why, and what to do.
    """
    from fastlora.finetune.data import missing
    from fastlora.finetune.prepare import convert
    from fastlora.finetune.run import locked

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{name}.lock"):
        if missing(folder, name):
            parts = [download(remote, folder / "downloads") for remote in SOURCES[name]]
            convert(name, parts, folder / name)
            for part in parts:
                part.unlink(missing_ok=True)


def download(remote: Remote, folder: Path, pause: float = PAUSE) -> Path:
    """Fetch `remote` into `folder` and return its path. It has the right checksum, or it is not there.

    A transfer that is cut goes on where it stopped (HTTP Range), in this call or, from `<name>.part`, in the next.
    Content with a wrong checksum is thrown away and fetched once more. The caller sees to it that one process works in
    `folder` at a time.

    Raises:
        WorkError: no progress in 5 attempts, a refusal by the server, or content with a wrong checksum.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if path.is_file() and sha256(path) == remote.sha256:
        return path
    instead = "give a folder with the data by --data DIR, or try --data sample"
    wrong = failures = furthest = 0
    with tqdm(total=remote.size, unit="B", unit_scale=True, desc=remote.name, disable=None) as bar:
        while True:
            try:
                why = "the connection was closed early"
                _receive(remote, part, bar)
            except urllib.error.HTTPError as error:
                why = f"the server says {error.code} {shown(error.reason)}"
                error.close()
                if error.code == 416:  # what we hold is not a beginning of what is there now
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 425, 429):
                    raise WorkError(f"{remote.url}: {why}; {instead}") from None
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                why = shown(str(getattr(error, "reason", error)) or type(error).__name__)
            have = part.stat().st_size if part.exists() else 0
            if have >= remote.size:
                if sha256(part) == remote.sha256:
                    return part.replace(path)
                part.unlink()
                wrong += 1
                if wrong == 2:
                    raise WorkError(f"{remote.url}: its sha256 is not the expected {remote.sha256[:16]}…: damaged on "
                                    f"its way or replaced at its home; {instead}")  # fmt: skip
                continue
            failures = 0 if have > furthest else failures + 1
            furthest = max(furthest, have)
            if failures >= ATTEMPTS:
                raise WorkError(f"{remote.url}: cannot be fetched ({why}); {instead}")
            time.sleep(min(30.0, pause * 2**failures))


def _receive(remote: Remote, part: Path, bar) -> None:
    """Append to `part` what one request gives; a byte more than the remote's size at most."""
    have = part.stat().st_size if part.exists() else 0
    if have >= remote.size:  # a killed run had all of it
        return
    request = urllib.request.Request(remote.url, headers={"User-Agent": "fastlora", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206 or f"bytes {have}-" not in answer.headers.get("Content-Range", ""):
            have = 0  # the server sends the whole file
        with open(part, "r+b" if have else "wb") as file:
            file.seek(have)
            while have <= remote.size and (chunk := answer.read1(min(1 << 18, remote.size + 1 - have))):
                file.write(chunk)
                have += len(chunk)
                bar.update(have - bar.n)
