"""From texts to a searchable index.

encoder, backends      texts to vectors in one process;  pool: over the cluster
documents, chunks      the distinct texts of a prepared data set, and windows of long ones
table, writer          the vector table and its only writer;  indexing: compaction and indexes;  snapshot: as Parquet
sync, embed, job       what differs between documents and table, brought up to date, verified
published, search      which table readers use, and queries of it;  where: conditions;  words: what a word is
pinecone_*, push       a namespace of Pinecone, and what has changed pushed to it;  dead_letters: what was refused
mine, negatives        hard negatives for training
"""
