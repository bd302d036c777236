"""Reading and writing that several families share."""
