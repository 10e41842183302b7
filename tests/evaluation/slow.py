"""The metrics in plain Python, document by document, written from their formulas."""

from __future__ import annotations

import math


def propensity_weights(frequency: list[int], n: int, a: float, b: float) -> list[float]:
    c = (math.log(n) - 1) * (b + 1) ** a
    return [1 + c * math.exp(-a * math.log(f + b)) for f in frequency]


def bands(frequency: list[int], head_share: float, tail_below: int) -> list[str]:
    by_count = sorted(range(len(frequency)), key=lambda label: (-frequency[label], label))
    head = set(by_count[: round(head_share * len(frequency))])
    return ["head" if label in head else "tail" if f < tail_below else "torso" for label, f in enumerate(frequency)]


def reference(
    predicted: list[list[int]],
    truth: list[set[int]],
    frequency: list[int],
    *,
    ks: list[int],
    n: int,
    a: float,
    b: float,
    head_share: float,
    tail_below: int,
) -> dict[str, float]:
    """``predicted[i]``: labels in rank order, -1 for an empty slot."""
    weight = propensity_weights(frequency, n, a, b)
    band = bands(frequency, head_share, tail_below)
    pairs = [(p, t) for p, t in zip(predicted, truth, strict=True) if t]
    out = {"documents": float(len(pairs)), "documents_without_labels": float(len(truth) - len(pairs))}
    for k in ks:
        precision, recall, ndcg = [], [], []
        psp, psp_best, psn, psn_best = [], [], [], []
        found = dict.fromkeys(("head", "torso", "tail"), 0)
        recalls: dict[str, list[float]] = {name: [] for name in found}
        for p, t in pairs:
            hit = [(j, label) for j, label in enumerate(p[:k], start=1) if label in t]
            best = sorted((weight[label] for label in t), reverse=True)[:k]
            norm = sum(1 / math.log2(j + 1) for j in range(1, min(k, len(t)) + 1))
            precision.append(len(hit) / k)
            recall.append(len(hit) / len(t))
            ndcg.append(sum(1 / math.log2(j + 1) for j, _ in hit) / norm)
            psp.append(sum(weight[label] for _, label in hit) / k)
            psp_best.append(sum(best) / k)
            psn.append(sum(weight[label] / math.log2(j + 1) for j, label in hit) / norm)
            psn_best.append(sum(w / math.log2(j + 1) for j, w in enumerate(best, start=1)) / norm)
            for _, label in hit:
                found[band[label]] += 1
            for name, shares in recalls.items():
                mine = {label for label in t if band[label] == name}
                if mine:
                    shares.append(len(mine & set(p[:k])) / len(mine))
        out[f"P@{k}"] = 100 * sum(precision) / len(pairs)
        out[f"R@{k}"] = 100 * sum(recall) / len(pairs)
        out[f"nDCG@{k}"] = 100 * sum(ndcg) / len(pairs)
        out[f"PSP@{k}"] = 100 * sum(psp) / sum(psp_best)
        out[f"PSnDCG@{k}"] = 100 * sum(psn) / sum(psn_best)
        for name in found:
            out[f"{name}/P@{k}"] = 100 * found[name] / (k * len(pairs))
            if recalls[name]:
                out[f"{name}/R@{k}"] = 100 * sum(recalls[name]) / len(recalls[name])
    return out
