"""What every part of training needs: errors, files that are complete or absent, locks, the machine, processes."""
