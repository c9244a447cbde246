"""Every method once more, as slow loops over plain numbers: from the papers and from what their released code computes.

Nothing of catpo is imported. `p` and `r` are the policy's and the reference's logits by side or `side@view`, `ids` the tokens.
"""

from __future__ import annotations

import math

BETA = 0.1


def log_softmax(row):
    top = max(row)
    return [value - top - math.log(sum(math.exp(logit - top) for logit in row)) for value in row]


def log_sigmoid(value):
    return -math.log1p(math.exp(-value)) if value > -30 else value - math.log1p(math.exp(value))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def logps(logits, tokens):
    return [log_softmax(row)[token] for row, token in zip(logits, tokens, strict=True)]


def raw(logits, tokens):
    return [row[token] for row, token in zip(logits, tokens, strict=True)]


def divergence(first, second):
    """KL[first || second] of each position over the whole vocabulary."""
    divergences = []
    for row, other in zip(first, second, strict=True):
        log_p, log_q = log_softmax(row), log_softmax(other)
        divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
    return divergences


def ratio(p, r, ids, key, weights=None):
    """Delta: the weighted sum of log-ratios of a side, perhaps under a view."""
    tokens = ids[key.split("@")[0]]
    pairs = zip(logps(p[key], tokens), logps(r[key], tokens), strict=True)
    weights = weights or [1.0] * len(tokens)
    return sum(weight * (a - b) for weight, (a, b) in zip(weights, pairs, strict=True))


def margin(p, r, ids, weights=None):
    weights = weights or {}
    return ratio(p, r, ids, "chosen", weights.get("chosen")) - ratio(p, r, ids, "rejected", weights.get("rejected"))


# ---- which tokens differ --------------------------------------------------------------------------------------------------


def longest_match(a, b, a_from, a_to, b_from, b_to):
    best = (a_from, b_from, 0)
    for i in range(a_from, a_to):
        for j in range(b_from, b_to):
            size = 0
            while i + size < a_to and j + size < b_to and a[i + size] == b[j + size]:
                size += 1
            if size > best[2]:
                best = (i, j, size)
    return best


def matching_blocks(a, b, a_from, a_to, b_from, b_to):
    i, j, size = longest_match(a, b, a_from, a_to, b_from, b_to)
    if not size:
        return []
    before = matching_blocks(a, b, a_from, i, b_from, j)
    return [*before, (i, j, size), *matching_blocks(a, b, i + size, a_to, j + size, b_to)]


def joined(blocks):
    """Neighbouring blocks are one."""
    merged = []
    for i, j, size in blocks:
        if merged and merged[-1][0] + merged[-1][2] == i and merged[-1][1] + merged[-1][2] == j:
            merged[-1] = (merged[-1][0], merged[-1][1], merged[-1][2] + size)
        else:
            merged.append((i, j, size))
    return merged


def segment_weights(ids, weight, block=3, one_sided=False, elsewhere=1.0):
    rejected, chosen = ids["rejected"], ids["chosen"]
    blocks = joined(matching_blocks(rejected, chosen, 0, len(rejected), 0, len(chosen)))
    kept = [match for match in blocks if match[2] >= block] + [(len(rejected), len(chosen), 0)]
    weights = {"chosen": [elsewhere] * len(chosen), "rejected": [elsewhere] * len(rejected)}
    a = b = 0
    for i, j, size in kept:
        if (i > a and j > b) or one_sided:
            for at in range(a, i):
                weights["rejected"][at] = weight
            for at in range(b, j):
                weights["chosen"][at] = weight
        a, b = i + size, j + size
    return weights


# ---- the methods ----------------------------------------------------------------------------------------------------------


def dpo(p, r, ids, smoothing=0.0):
    h = margin(p, r, ids)
    return -(1 - smoothing) * log_sigmoid(BETA * h) - smoothing * log_sigmoid(-BETA * h)


def ipo(p, r, ids, mean=False):
    if not mean:
        return (margin(p, r, ids) - 1 / (2 * BETA)) ** 2
    chosen, rejected = (ratio(p, r, ids, side) / len(ids[side]) for side in ("chosen", "rejected"))
    return (chosen - rejected - 1 / (2 * BETA)) ** 2


def mean(values):
    return sum(values) / len(values)


def likelihood(p, ids):
    """Mean negative log-likelihood of the chosen tokens."""
    return -mean(logps(p["chosen"], ids["chosen"]))


def of_ratios(formula, per_token=False):
    """A loss of the two log-ratios: summed over tokens, or their means."""

    def loss(p, r, ids):
        lengths = [len(ids[side]) if per_token else 1 for side in ("chosen", "rejected")]
        return formula(*(ratio(p, r, ids, side) / n for side, n in zip(("chosen", "rejected"), lengths, strict=True)))

    return loss


def hinge(c, r):
    """SLiC-HF, arXiv 2305.10425, as normalised in RSO, arXiv 2309.06657, Table 1."""
    return max(0.0, 1 - BETA * (c - r))


def exo(c, r, epsilon):
    """EXO, arXiv 2402.00856, Eq. 16 for two responses: KL of the policy's choice from the smoothed label."""
    policy = math.exp(BETA * c) / (math.exp(BETA * c) + math.exp(BETA * r))
    return policy * math.log(policy / (1 - epsilon)) + (1 - policy) * math.log((1 - policy) / epsilon)


def nca(c, r):
    """NCA, arXiv 2402.05369, for a pair: rewards of 1 and 0, two responses as noise."""
    return -log_sigmoid(BETA * c) - 0.5 * (log_sigmoid(-BETA * c) + log_sigmoid(-BETA * r))


def robust(c, r, epsilon):
    """Robust DPO, arXiv 2403.00409, Eq. 12."""
    right, wrong = -log_sigmoid(BETA * (c - r)), -log_sigmoid(BETA * (r - c))
    return ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon)


def bco(c, r):
    """BCO, arXiv 2404.04656, with a reward shift of 0."""
    return -math.log(sigmoid(BETA * c)) - math.log(1 - sigmoid(BETA * r))


def sppo(c, r):
    """SPPO, arXiv 2405.00675, Eq. 4.7: the chosen response wins with probability 1. Its eta is 1 / beta."""
    return (c - (1 - 0.5) / BETA) ** 2 + (r - (0 - 0.5) / BETA) ** 2


def apo_zero(c, r):
    """APO, arXiv 2408.06266, Eq. 7, as a loss between 0 and 2."""
    return (1 - sigmoid(BETA * c)) + sigmoid(BETA * r)


def apo_down(c, r):
    """The same, Eq. 8."""
    return sigmoid(BETA * c) + (1 - sigmoid(BETA * c - BETA * r))


def discopop(c, r, tau=0.05):
    """DiscoPOP, arXiv 2406.08414, Eq. 5: the log-ratio modulated loss."""
    rho = BETA * (c - r)
    share = sigmoid(rho / tau)
    return (1 - share) * math.log(1 + math.exp(-rho)) + share * math.exp(-rho)


def mpo(p, r, ids):
    """A mix of losses, arXiv 2411.10442, with the weights of its released commands: DPO 0.8, BCO 0.2, SFT 1."""
    return 0.8 * dpo(p, r, ids) + 0.2 * of_ratios(bco)(p, r, ids) + likelihood(p, ids)


# Without a reference.


def cpo(p, ids, alpha=1.0, smoothing=0.0):
    """CPO, arXiv 2401.08417, Eq. 3-4, the likelihood a mean over tokens as in the released code."""
    c, r = (BETA * sum(logps(p[side], ids[side])) for side in ("chosen", "rejected"))
    return -(1 - smoothing) * log_sigmoid(c - r) - smoothing * log_sigmoid(r - c) + alpha * likelihood(p, ids)


def cpo_hinge(p, ids):
    c, r = (sum(logps(p[side], ids[side])) for side in ("chosen", "rejected"))
    return hinge(c, r) + likelihood(p, ids)


def cpo_ipo(p, ids):
    c, r = (mean(logps(p[side], ids[side])) for side in ("chosen", "rejected"))
    return (c - r - 1 / (2 * BETA)) ** 2 + likelihood(p, ids)


def simpo(p, ids, beta=2.0, gamma=1.0, alpha=0.0, nll=0.0, smoothing=0.0):
    """SimPO, arXiv 2405.14734, Eq. 6; with `alpha` the rewards of AlphaPO, arXiv 2501.03884."""
    rewards = []
    for side in ("chosen", "rejected"):
        p_mean = math.exp(mean(logps(p[side], ids[side])))
        rewards.append(beta * ((1 - p_mean**-alpha) / alpha if alpha else math.log(p_mean)))
    margin = rewards[0] - rewards[1] - gamma
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin) + nll * likelihood(p, ids)


def orpo(p, ids):
    """ORPO, arXiv 2403.07691, Eq. 3-7, lambda = 0.1."""
    odds = []
    for side in ("chosen", "rejected"):
        p_mean = math.exp(mean(logps(p[side], ids[side])))
        odds.append(p_mean / (1 - p_mean))
    return likelihood(p, ids) - 0.1 * math.log(sigmoid(math.log(odds[0] / odds[1])))


def catpo(p, r, ids, weights, kl_weight, beta=BETA, reverse=False):
    """Eq. 8-10."""
    kl = 0.0
    for side in ("chosen", "rejected"):
        divergences = divergence(r[side], p[side]) if reverse else divergence(p[side], r[side])
        for weight, token_kl in zip(weights[side], divergences, strict=True):
            kl += weight * token_kl
    return -log_sigmoid(beta * margin(p, r, ids, weights)) + kl_weight * kl


def ddpo(p, r, ids, weight, mean):
    omega = segment_weights(ids, weight)
    scores = []
    for side in ("chosen", "rejected"):
        scores.append(ratio(p, r, ids, side, omega[side]) / (sum(omega[side]) if mean else 1))
    return -log_sigmoid(BETA * (scores[0] - scores[1]))


def vdpo(p, r, ids, gamma, unconditional, view, suffix=False):
    first = 0
    while suffix and ids["chosen"][first] == ids["rejected"][first]:
        first += 1
    scores = []
    for side in ("chosen", "rejected"):
        clean, reference = logps(p[side], ids[side]), logps(r[side], ids[side])
        without = logps({"policy": p, "reference": r}[unconditional][f"{side}@{view}"], ids[side])
        score = 0.0
        for at in range(first, len(clean)):
            score += gamma * clean[at] - (gamma - 1) * without[at] - reference[at]
        scores.append(score)
    return -log_sigmoid(BETA * (scores[0] - scores[1]))


def tpo(p, r, ids, view, multiply=False):
    scores = []
    for side in ("chosen", "rejected"):
        score = 0.0
        for model, sign in ((p, 1), (r, -1)):
            clean, noised = raw(model[side], ids[side]), raw(model[f"{side}@{view}"], ids[side])
            for at, logp in enumerate(logps(model[side], ids[side])):
                s = sigmoid(clean[at] - noised[at])
                c = 0.5 + (s if side == "chosen" else 1 - s)
                score += sign * (c * logp if multiply else logp + math.log(c))
        scores.append(score)
    return -log_sigmoid(BETA * (scores[0] - scores[1]))


def povid(p, r, ids, view, one_sigmoid=False):
    slipped = 0.0
    for model, sign in ((p, 1), (r, -1)):
        for row, noised in zip(model["chosen"], model[f"chosen@{view}"], strict=True):
            slip = max(range(len(noised)), key=lambda token: noised[token])
            slipped += sign * log_softmax(row)[slip]
    chosen, rejected = ratio(p, r, ids, "chosen"), ratio(p, r, ids, "rejected")
    if one_sigmoid:
        return -log_sigmoid(BETA * (chosen - 0.5 * rejected - 0.5 * slipped))
    return -0.5 * log_sigmoid(BETA * (chosen - rejected)) - 0.5 * log_sigmoid(BETA * (chosen - slipped))


def mdpo(p, r, ids, view, image_weight=1.0, anchor_weight=1.0):
    """The sums of OPA-DPO's paper and of TARS have the same terms, with other weights."""
    chosen = ratio(p, r, ids, "chosen")
    image = chosen - ratio(p, r, ids, f"chosen@{view}")
    terms = image_weight * log_sigmoid(BETA * image) + anchor_weight * log_sigmoid(BETA * chosen)
    return -log_sigmoid(BETA * margin(p, r, ids)) - terms


def tdpo(p, r, ids, version, alpha=0.5):
    moved = {side: sum(divergence(r[side], p[side])) for side in ("chosen", "rejected")}
    less = moved["rejected"] - moved["chosen"]
    return -log_sigmoid(BETA * (margin(p, r, ids) - (less if version == 1 else alpha * less)))


def chip(p, r, ids, view, omega=4.0, tau=0.1, released=False):
    weights = segment_weights(ids, omega)
    moved = {side: sum(divergence(r[side], p[side])) for side in ("chosen", "rejected")}
    chosen = ratio(p, r, ids, "chosen", weights["chosen"])
    image = chosen - ratio(p, r, ids, f"chosen@{view}", weights["chosen"])
    if released:
        policy, reference = logps(p[f"chosen@{view}"], ids["chosen"]), logps(r[f"chosen@{view}"], ids["chosen"])
        of_policy = sum(weight * logp for weight, logp in zip(weights["chosen"], policy, strict=True))
        image = chosen - (of_policy - sum(reference) * sum(weights["chosen"]))
    return -log_sigmoid(BETA * (margin(p, r, ids, weights) + image - tau * (moved["rejected"] - moved["chosen"])))


def chip_levels(p, r, ids, view, omega=4.0, tau=0.1):
    moved = {side: sum(divergence(r[side], p[side])) for side in ("chosen", "rejected")}
    image = ratio(p, r, ids, "chosen") - ratio(p, r, ids, f"chosen@{view}")
    response = -log_sigmoid(BETA * margin(p, r, ids))
    segment = -log_sigmoid(BETA * margin(p, r, ids, segment_weights(ids, omega)))
    return response + segment + tau * BETA * (moved["rejected"] - moved["chosen"]) - log_sigmoid(BETA * image)


def tgdpo(p, r, ids, judge, alpha=0.5):
    total = 0.0
    for side, sign in (("chosen", 1), ("rejected", -1)):
        policy, reference, rewards = (logps(logits, ids[side]) for logits in (p[side], r[side], judge[f"{side}@judge"]))
        for at in range(len(policy)):
            q, d = rewards[at] - reference[at], policy[at] - reference[at]
            total += sign * BETA * (1 + sign * alpha * BETA * q) * d
    return -log_sigmoid(total)


def hsa_dpo(p, r, ids, severity):
    return -log_sigmoid(BETA * (ratio(p, r, ids, "chosen") - severity * ratio(p, r, ids, "rejected")))


def amp(p, r, ids, is_best):
    return -log_sigmoid(BETA * margin(p, r, ids)) - is_best * ratio(p, r, ids, "chosen")


def rrpo(p, r, ids, alpha):
    phrases = segment_weights(ids, 1.0, block=1, one_sided=True, elsewhere=0.0)
    return -log_sigmoid(BETA * margin(p, r, ids, phrases)) + alpha * sum(divergence(r["chosen"], p["chosen"]))


def opa_dpo(p, r, ids, view, weights=None):
    longest = max(len(tokens) for tokens in ids.values())
    weights = weights or {side: [1.0] * len(ids[side]) for side in ids}

    def rewards(key):
        side = key.split("@")[0]
        pairs = zip(weights[side], logps(p[key], ids[side]), logps(r[key], ids[side]), strict=True)
        values = [weight * (a - b) for weight, a, b in pairs]
        return values + [0.0] * (longest - len(values))

    chosen, rejected, masked = rewards("chosen"), rewards("rejected"), rewards(f"chosen@{view}")
    total = 0.0
    for at in range(longest):
        total -= log_sigmoid(BETA * (chosen[at] - rejected[at]))
        total -= 0.2 * log_sigmoid(BETA * (chosen[at] - masked[at]))
        total -= log_sigmoid(BETA * chosen[at])
    return total / longest
