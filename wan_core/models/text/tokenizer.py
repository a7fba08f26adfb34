"""Prompts to umT5 token ids.

The official pipeline reads ``google/umt5-xxl/`` through Hugging Face's fast tokenizer, ComfyUI the SentencePiece model
inside its file. Both files describe one vocabulary and agree on all text it covers; of a character outside it the
fast tokenizer makes one ``<unk>``, SentencePiece its UTF-8 bytes.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...config import TEXT_LENGTH, TOKENIZER_FOLDER
from ...errors import WanError
from .tokenizer_check import problem_of

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as FastTokenizer

FAST_FILE = "tokenizer.json"
SPIECE_FILE = "spiece.model"
FILES = (FAST_FILE, SPIECE_FILE)
_END = "</s>"


class Tokenizer:
    """Cleaned text to ids.

    Args:
        pieces: cleaned text -> ids without the end token.
        size: ids are below this.
        eos: the id of ``</s>``.
        source: where the vocabulary came from, for messages.
    """

    def __init__(self, pieces: Callable[[str], list[int]], *, size: int, eos: int, source: str) -> None:
        self.pieces = pieces
        self.size = size
        self.eos = eos
        self.source = source

    def encode(self, text: str) -> list[int]:
        """At most 512 ids, the last always ``</s>``: a longer prompt loses its tail."""
        return [*self.pieces(clean(text))[: TEXT_LENGTH - 1], self.eos]


def clean(text: str) -> str:
    """Mend broken Unicode, resolve HTML entities (twice: some are escaped doubly), make white space single."""
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise WanError("Cleaning prompts as Wan does needs the package ftfy: pip install ftfy") from error
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fix_text(text)))).strip()


def load_tokenizer(source: Tokenizer | bytes | str | Path) -> Tokenizer:
    """A tokenizer from a SentencePiece model (bytes or file), a ``tokenizer.json``, or a folder that holds one of them.

    Where a folder holds both, ``tokenizer.json`` counts, because the official pipeline reads that.

    Raises:
        WanError: nothing there, or a file of another kind.
    """
    if isinstance(source, Tokenizer):
        return source
    if isinstance(source, bytes):
        return _from_spiece(source, "the SentencePiece model inside the checkpoint")
    file = tokenizer_file(source)
    return _from_json(file) if file.suffix.lower() == ".json" else _from_spiece(file.read_bytes(), str(file))


def tokenizer_file(source: str | Path) -> Path:
    """The file to read for a file or folder that the user named.

    Raises:
        WanError: the folder holds no tokenizer.
    """
    source = Path(source)
    if source.is_file():
        return source
    places = [source, source / TOKENIZER_FOLDER, source / "tokenizer"]
    return _first_file(places) or _refuse(f"No tokenizer at {source}", places)


def find_tokenizer(checkpoint: str | Path, rows: int | None = None, names: Sequence[str] = FILES) -> Path:
    """The tokenizer file that lies beside a text encoder in the official or the diffusers layout.

    Args:
        rows: of the text encoder's table; files that do not belong to such an encoder are passed over.
        names: of the files that will do.

    Raises:
        WanError: none found; the message names every place, and what was wrong with the files that are there.
    """
    path, problems = Path(checkpoint).absolute(), []
    for file in places_beside(path, names):
        if not file.is_file():
            continue
        problem = problem_of(file, rows) if rows is not None else None
        if problem is None:
            return file
        problems.append(f"{file} {problem}")
    wrong = f" ({'; '.join(problems)})" if problems else ""
    return _refuse(f"No tokenizer found for {path}{wrong}", _folders_beside(path))


def places_beside(checkpoint: Path, names: Sequence[str] = FILES) -> list[Path]:
    """The files that may be a text encoder's tokenizer, likeliest first, there or not."""
    return [folder / name for folder in _folders_beside(checkpoint) for name in names]


def train_tiny_tokenizer(
    texts: Iterable[str], vocabulary: int = 400, *, phrases: Iterable[str] = (), fold_case: bool = False
) -> bytes:
    """A small SentencePiece model in umT5's manner, for small test checkpoints; the same texts give the same bytes.

    Unigram with byte fallback, no normalisation, ids 0 ``<pad>``, 1 ``</s>``, 2 ``<s>``, 3 ``<unk>``.

    Args:
        vocabulary: an upper limit, of which 260 are the special tokens and the single bytes.
        phrases: always one piece each, spaces and all; the longest wins.
        fold_case: upper and lower case, full and half width are the same (nmt_nfkc_cf).
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="nmt_nfkc_cf" if fold_case else "identity",
        user_defined_symbols=[phrase.replace(" ", "▁") for phrase in phrases],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece=_END,
        bos_piece="<s>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer_folder(folder: str | Path, model: bytes) -> None:
    """Lay a SentencePiece model out as ``google/umt5-xxl/`` is, with the fast tokenizer's file and a config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPIECE_FILE).write_bytes(model)
    (folder / FAST_FILE).write_text(_fast_json(model), encoding="utf-8")
    config = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "pad_token": "<pad>",
        "eos_token": _END,
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "model_max_length": TEXT_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _from_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    try:
        fast = FastTokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics with BaseException
        raise WanError(f"{file} is no readable tokenizer.json ({error}). Download google/umt5-xxl again.") from error
    fast.no_truncation()
    fast.no_padding()
    eos = fast.token_to_id(_END)
    if eos is None:
        raise WanError(f"{file} has no {_END} token, so it is not umT5's tokenizer. Use the one of google/umt5-xxl.")
    return Tokenizer(
        lambda text: _fast_ids(fast, text, file),
        size=fast.get_vocab_size(with_added_tokens=False),
        eos=eos,
        source=str(file),
    )


def _fast_ids(fast: FastTokenizer, text: str, file: Path) -> list[int]:
    try:
        return fast.encode(text, add_special_tokens=False).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library panics with BaseException, which would end a worker for good
        raise WanError(
            f"{file} fails on this prompt ({_first_line(error)}). Download google/umt5-xxl again, or take "
            "characters out of the prompt that are no text."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _from_spiece(model: bytes, source: str) -> Tokenizer:
    processor = _processor(model, source)
    if processor.eos_id() < 0:
        raise WanError(f"{source} has no {_END} token, so it is not umT5's tokenizer. Use the one of google/umt5-xxl.")
    return Tokenizer(
        lambda text: processor.encode(text), size=processor.get_piece_size(), eos=processor.eos_id(), source=source
    )


def _processor(model: bytes, source: str) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise WanError(
            f"{source} is no SentencePiece model ({len(model)} bytes). Expected {SPIECE_FILE} of "
            "google/umt5-xxl; download it again."
        ) from error


def _folders_beside(path: Path) -> list[Path]:
    """Folders that may hold the tokenizer of a text encoder, likeliest first."""
    here = path if path.is_dir() else path.parent
    official = [folder / TOKENIZER_FOLDER for folder in (here, here.parent, here.parent.parent)]
    return [*official, here / "tokenizer", here.parent / "tokenizer", here / "umt5-xxl", here]


def _first_file(folders: Iterable[Path]) -> Path | None:
    files = (folder / name for folder in folders for name in FILES)
    return next((file for file in files if file.is_file()), None)


def _refuse(problem: str, places: list[Path]) -> Path:
    raise WanError(
        f"{problem}. Looked for {FAST_FILE} or {SPIECE_FILE} in: {', '.join(map(str, places))}. Download the folder "
        f"{TOKENIZER_FOLDER}/ of the official checkpoint to the first of these, name its path as the tokenizer, or "
        "use umt5_xxl_fp16.safetensors as repackaged for ComfyUI, which carries its own."
    )


def _fast_json(model: bytes) -> str:
    """The fast tokenizer's description of a SentencePiece model, as Hugging Face converts umT5's.

    But for one thing: it falls back to bytes, as most text lies outside a tiny vocabulary and both files should make
    the same of it.
    """
    from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as FastTokenizer

    processor = _processor(model, "the model given")
    size = processor.get_piece_size()
    vocabulary = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(size)]
    fast = FastTokenizer(models.Unigram(vocabulary, unk_id=processor.unk_id(), byte_fallback=True))
    fast.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", pair=f"$A {_END} $B {_END}", special_tokens=[(_END, processor.eos_id())]
    )
    special = [i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)]
    fast.add_special_tokens([AddedToken(processor.id_to_piece(i), normalized=False, special=True) for i in special])
    return fast.to_str(pretty=False)
