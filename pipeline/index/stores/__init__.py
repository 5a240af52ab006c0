"""Where vectors are kept: one interface, and LanceDB, Parquet and Pinecone behind it."""
