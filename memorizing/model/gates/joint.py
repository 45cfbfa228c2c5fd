"""One softmax over local and retrieved keys, written as a gate without parameters."""

from memorizing.model.gates.contract import Gate


class JointGate(Gate):
    """Gate with logit `log-sum-exp of remote scores - log-sum-exp of local scores`.

    Gradients reach queries and local keys.
    """

    compares_scores = True

    def logit(self, query_BHND, local, remote):
        return remote.scores.log_total_BHN - local.scores.log_total_BHN
