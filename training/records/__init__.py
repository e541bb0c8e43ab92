"""What runs leave behind: the record in a run's folder, the table of all runs, pages, pictures and cards made of it."""
