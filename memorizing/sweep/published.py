"""The paper's figures, to show next to ours: token perplexities of its main table (arXiv 2203.08913, section 4).

They belong to models of 200M parameters, trained for 500,000 steps of 2^17 tokens with 32,000 SentencePiece tokens.
Token perplexity depends on the vocabulary, so compare changes within a column, not single values. The figures come from
public quotations of the paper, not from the paper itself.
"""

from typing import NamedTuple

SOURCE = "arXiv 2203.08913: 200M parameters, 32,000 SentencePiece tokens, 500,000 steps; as publicly quoted"
CORPORA = ("arxiv", "pg19", "c4", "github", "isabelle")


class PublishedRow(NamedTuple):
    """One row: perplexities by corpus. The XL cache, if on, is as long as the context."""

    context: int
    memory: int
    xl_cache: bool
    perplexity: dict[str, float]


def _row(context: int, memory: int, xl_cache: bool, *perplexities: float) -> PublishedRow:
    return PublishedRow(context, memory, xl_cache, dict(zip(CORPORA, perplexities, strict=True)))


MAIN_TABLE = (
    _row(512, 0, False, 3.29, 13.71, 17.20, 3.05, 3.09),
    _row(2048, 0, False, 2.69, 12.37, 14.81, 2.22, 2.39),
    _row(512, 0, True, 2.67, 12.34, 15.38, 2.26, 2.46),
    _row(2048, 0, True, 2.42, 11.88, 14.03, 2.10, 2.16),
    _row(512, 1536, False, 2.61, 12.50, 14.97, 2.20, 2.33),
    _row(512, 8192, False, 2.49, 12.29, 14.42, 2.09, 2.19),
    _row(512, 8192, True, 2.37, 11.93, 14.04, 2.03, 2.08),
    _row(512, 65536, True, 2.31, 11.62, 14.04, 1.87, 2.06),
    _row(2048, 8192, True, 2.33, 11.84, 13.80, 1.98, 2.06),
    _row(2048, 65536, True, 2.26, 11.37, 13.64, 1.80, 1.99),
)
