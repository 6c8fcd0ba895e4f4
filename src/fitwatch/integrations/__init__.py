"""fitwatch in other libraries: one module for each, which imports that library. Nothing here is imported by itself."""
