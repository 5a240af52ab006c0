"""Retrieval metrics over ranked lists, by ranx, and exact nearest neighbours in blocks.

    >>> retrieval_metrics({"q": {"d1": 1}}, {"q": {"d2": 0.9, "d1": 0.8}})
    {'ndcg@10': 0.63…, 'mrr@10': 0.5, 'recall@1': 0.0, 'recall@10': 1.0, 'recall@100': 1.0}
"""
