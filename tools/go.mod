module redoubt.dev/redoubt/tools

go 1.26.0
