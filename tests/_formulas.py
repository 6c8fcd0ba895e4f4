"""Loss formulas for one position, in Python floats, in terms of log p and log(1 - p)."""

import math


def log_sum_exp(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def minus_log_sigmoid(x):
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def log_odds(z, k):
    """log(p / (1 - p)) of class k: exact however confident the logits are."""
    return z[k] - log_sum_exp(z[:k] + z[k + 1 :])


def surprise(z, k):
    """-log p of class k."""
    return minus_log_sigmoid(log_odds(z, k))


def surprise_of_not(z, k):
    """-log(1 - p) of class k."""
    return minus_log_sigmoid(-log_odds(z, k))


def cross_entropy(z, y, weight=None, smoothing=0.0):
    """w_y times the loss: the smoothing mass has the weights of the classes that it falls on (pytorch#104776)."""
    w = weight or [1.0] * len(z)
    spread = math.fsum(w[c] * surprise(z, c) for c in range(len(z))) / len(z)
    return (1 - smoothing) * w[y] * surprise(z, y) + smoothing * spread


def focal(z, y, gamma):
    """-(1 - p)^gamma log p."""
    return math.exp(-gamma * surprise_of_not(z, y)) * surprise(z, y)


def logit_adjusted(z, y, counts, tau, **options):
    """Cross-entropy of z + tau log prior."""
    return cross_entropy([v + tau * math.log(n / sum(counts)) for v, n in zip(z, counts, strict=True)], y, **options)


def ldam(z, y, counts, max_margin, scale):
    """Cross-entropy of s (z - margin of the true class), the margin being max_margin (min n / n)^(1/4)."""
    margin = max_margin * (min(counts) / counts[y]) ** 0.25
    return cross_entropy([scale * (v - margin * (k == y)) for k, v in enumerate(z)], y)


def expected_cost(z, y, costs):
    """Sum over j of C[y, j] p[j]."""
    return math.fsum(costs[y][j] * math.exp(-surprise(z, j)) for j in range(len(z)))


def real_world(z, y, fn, fp):
    """-a_y log p_y - sum of B[y, j] log(1 - p_j)."""
    others = math.fsum(fp[y][j] * surprise_of_not(z, j) for j in range(len(z)) if j != y)
    return fn[y] * surprise(z, y) + others
