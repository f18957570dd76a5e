"""The tokenizer of a checkpoint folder: text to ids, ids to text, chat messages to ids.

No torch and no transformers: only ``tokenizers`` and the folder's JSON files, so the offline API and a server
process share it. Reads ``tokenizer.json`` (required), ``tokenizer_config.json``, ``special_tokens_map.json``,
``chat_template.jinja`` and ``additional_chat_templates/*.jinja``. Always holds: a loaded tokenizer never changes,
opens no socket, and gives the ids that ``tokenizer.json`` defines. transformers 5 gives the same (``add_bos_token``
and ``add_eos_token`` have no say beside that file, its post-processor decides), except where it rebuilds the file's
rules for the class ``LlamaTokenizer``: there it drops one of the spaces that open a text, and the space that
sentencepiece puts after a special token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.text.bounds import bytes_per_token
from jitgraph.text.pieces import TextStream, TokenPieces
from jitgraph.text.prose import ASSETS
from jitgraph.text.template import ChatTemplate

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SHORT_CHARS = 4096
"""Up to this many characters a text is encoded where it stands, in a millisecond or two."""
_SLOW_FILES = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model", "tiktoken.model", "vocab.txt")


def bundled_tokenizer_folder() -> Path:
    """Folder of the tokenizer that ships with the package, for models with random weights (2,048 entries)."""
    return ASSETS / "tokenizer"


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file.

    Raises:
        CheckpointError: not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}; save it again")
    return content


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name a checkpoint folder that holds a tokenizer.json")
    if not path.is_file():
        slow = [name for name in _SLOW_FILES if (folder / name).is_file()]
        found = f"only {slow[0]}, and no tokenizer.json" if slow else "no tokenizer.json"
        raise CheckpointError(
            f"{folder} holds {found}; save a fast tokenizer into it with transformers: "
            f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{path} is not a readable tokenizer ({reason}); download or save it again") from error
    # A file may carry the truncation and padding of its training run; neither may touch a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _content(token: Any) -> str | None:
    """A token's text, written as a string or as an object with ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like; tokenizer_config.json wins over the older special_tokens_map.json."""
    legacy = _read_json(folder / "special_tokens_map.json")
    found = {name: _content(config[name] if name in config else legacy.get(name)) for name in _NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _register_added_tokens(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Give the tokenizer the added tokens that only tokenizer_config.json knows, as transformers does."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, Mapping) else ()
    for _, entry in sorted(entries, key=lambda item: int(item[0]) if str(item[0]).isdigit() else 0):
        text = _content(entry)
        if text is None or text in known or not isinstance(entry, Mapping):
            continue
        named_flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {flag: bool(entry[flag]) for flag in named_flags if flag in entry}
        tokenizer.add_tokens([tokenizers.AddedToken(text, **flags)])
        known.add(text)
    missing = [text for text in dict.fromkeys(named.values()) if text not in known]
    tokenizer.add_special_tokens([text for text in missing if tokenizer.token_to_id(text) is not None])


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files first, else those written into tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    try:
        templates = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a chat template in {folder} cannot be read ({error}); save it again") from error
    inline = config.get("chat_template")
    if templates or inline is None:
        return templates
    if isinstance(inline, str):
        return {"default": inline}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in inline}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"chat_template in {folder / 'tokenizer_config.json'} must be a text or a list of objects with "
            f"name and template; correct it"
        ) from error


class Tokenizer:
    """A checkpoint's tokenizer. Make one with ``from_folder``.

    Attributes:
        pieces: the bytes of each id, for the incremental detokenizer.
        bytes_per_token: most bytes of UTF-8 that a text can have for each of its tokens; None where that is unknown.
        special_tokens: ``bos_token``, ``eos_token`` and the like, by name.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        source: str,
    ) -> None:
        self._backend = backend
        self._source = source
        self.special_tokens = dict(special_tokens)
        layout = json.loads(backend.to_str())
        self.pieces = TokenPieces(backend, layout["decoder"], source)
        self.bytes_per_token = bytes_per_token(backend, layout)
        self._chat_templates = {name: ChatTemplate(text) for name, text in chat_templates.items()}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Load a checkpoint folder's tokenizer.

        Raises:
            CheckpointError: a file is missing, damaged, or asks for something unsupported; the message names it.
        """
        folder = Path(path)
        backend = _read_tokenizer(folder)
        config = _read_json(folder / "tokenizer_config.json")
        named = _named_tokens(folder, config)
        _register_added_tokens(backend, config, named)
        return cls(backend, named, _chat_templates(folder, config), str(folder / "tokenizer.json"))

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, added tokens included; a model may have more rows in its embedding."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def base_vocab_size(self) -> int:
        """Entries besides those that were added to the finished vocabulary, such as special tokens."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a text, or None."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a text, or None."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, or None."""
        return self._id_of("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, or None; a checkpoint's generation config may list more."""
        return self._id_of("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, or None."""
        return self._id_of("pad_token")

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template, or None where the checkpoint has none."""
        template = self._chat_templates.get("default")
        return None if template is None else template.source

    def serialised(self) -> str:
        """The whole tokenizer as a tokenizer.json, with the added tokens that only other files of its folder name."""
        return str(self._backend.to_str())

    @property
    def tool_template(self) -> str | None:
        """Source of the template for conversations with tools: ``tool_use`` where there is one, else the default."""
        template = self._chat_templates.get("tool_use")
        return self.chat_template if template is None else template.source

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Other threads run meanwhile where it is long.

        Args:
            text: what to encode; special tokens written in it are recognised.
            add_special_tokens: apply the tokenizer's post-processor, which as a rule puts BOS in front.

        Raises:
            RequestError: not a text, or a text with lone surrogates.
        """
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be a text or a list of token ids, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate at character {error.start}; pass valid Unicode"
            ) from error
        if len(text) <= _SHORT_CHARS:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        # ``encode`` keeps the interpreter's lock until it is done, the call for batches does not.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; exactly what the incremental detokenizer shows for them without a prompt.

        Raises:
            RequestError: a negative id.
        """
        stream = TextStream(self.pieces, skip_special_tokens)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation under the checkpoint's chat template.

        Where the checkpoint has a template named ``tool_use``, it serves conversations with tools.

        Raises:
            RequestError: no chat template, or messages that it refuses.
            CheckpointError: a template that cannot be compiled.
        """
        names = ("tool_use", "default") if tools is not None else ("default",)
        template = next((self._chat_templates[name] for name in names if name in self._chat_templates), None)
        if template is None:
            others = ", ".join(sorted(self._chat_templates))
            raise RequestError(
                f"{self._source} comes with no default chat template{f' (only {others})' if others else ''}; "
                f"send a plain prompt, or add a chat_template.jinja to the folder"
            )
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables={**self.special_tokens, **(variables or {})},
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of ``render_chat``. The template itself writes BOS, so none is added.

        Raises:
            RequestError, CheckpointError: as ``render_chat``.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables)
        return self.encode(text, add_special_tokens=False)


def find_tokenizer(folder: Path | None) -> Tokenizer | None:
    """The folder's tokenizer, the bundled one for presets (None), and None for a checkpoint that comes without any.

    Raises:
        CheckpointError: as ``Tokenizer.from_folder``.
    """
    if folder is None:
        return Tokenizer.from_folder(bundled_tokenizer_folder())
    known = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).exists() for name in known):
        return None
    return Tokenizer.from_folder(folder)
