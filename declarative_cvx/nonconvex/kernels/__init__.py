"""Problems with a method of their own."""
