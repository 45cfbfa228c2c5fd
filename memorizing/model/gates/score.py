"""A gate without parameters that compares the best scores of both attentions."""

from memorizing.model.gates.contract import Gate


class ScoreGate(Gate):
    """Gate with logit `best remote score - best local score`: a softmax of the two.

    Gradients reach queries and local keys.
    """

    compares_scores = True

    def logit(self, query_BHND, local, remote):
        return remote.scores.best_BHN - local.scores.best_BHN
