"""MongoDB documents, the transaction, the outbox, deadlines and the embedded servers."""
