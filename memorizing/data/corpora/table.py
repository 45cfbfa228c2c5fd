"""The table of corpora."""

from memorizing.data.corpora.arxiv import Arxiv
from memorizing.data.corpora.c4 import C4
from memorizing.data.corpora.corpus import Corpus
from memorizing.data.corpora.github import Github
from memorizing.data.corpora.isabelle import Isabelle
from memorizing.data.corpora.pg19 import Pg19

CORPORA: dict[str, type[Corpus]] = {"pg19": Pg19, "arxiv": Arxiv, "github": Github, "isabelle": Isabelle, "c4": C4}
"""The corpora by their names in `Prepare.source`. A corpus's gin section has the name of its class."""
