"""What the main example does with files, syntax trees and SQLite. Plain Python: the pipeline is in the example."""
