"""Embeds texts into a searchable vector table.

encoder, backends      encode texts in one process;  pool: on the cluster
documents, chunks      the distinct texts of a prepared data set, and windows of long texts
table, writer          the vector table and its single writer;  indexing: compaction and indexes;  snapshot: Parquet
sync, embed, job       compare documents with the table, update it, verify it
published, search      which table readers use, and queries of it;  where: filters;  words: tokenization for BM25
pinecone_*, push       Pinecone namespaces, and pushing changes to them;  dead_letters: rejected rows
mine, negatives        hard negatives for training
"""
