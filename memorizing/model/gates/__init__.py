"""The gates of memory layers, by the name in `Model.gate`.

    head     b_H                                          one learned number per head (the paper)
    layer    b                                            one learned number per layer
    token    q . w_H + b_H                                learned, depends on the query
    score    best remote score - best local score         no parameters: a softmax of the two
    joint    log-sum-exp of remote - that of local scores one softmax over local and retrieved keys

To add a gate, write a subclass of `Gate` in a file of its own and add a line to `GATES`.
"""

from memorizing.model.gates.contract import Gate, gate_value, mix
from memorizing.model.gates.head import HeadGate
from memorizing.model.gates.joint import JointGate
from memorizing.model.gates.layer import LayerGate
from memorizing.model.gates.score import ScoreGate
from memorizing.model.gates.token import TokenGate

__all__ = ["GATES", "Gate", "gate_value", "mix"]

GATES: dict[str, type[Gate]] = {
    "head": HeadGate,
    "layer": LayerGate,
    "token": TokenGate,
    "score": ScoreGate,
    "joint": JointGate,
}
