package cli

import (
	"github.com/spf13/cobra"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/spec"
)

func (a *app) diskCommand() *cobra.Command {
	disk := &cobra.Command{Use: "disk", Short: "Disk images"}
	disk.AddCommand(&cobra.Command{
		Use:     "create PATH SIZE",
		Short:   "Create an empty raw image; an existing file is left alone",
		Example: "  redoubt disk create web-1.img 10GiB",
		Args:    names(2, "a path and a size"),
		RunE: func(_ *cobra.Command, args []string) error {
			size, err := spec.ParseSize(args[1])
			if err != nil {
				return usagef("disk create: %v", err)
			}
			if err := block.Create(args[0], int64(size)); err != nil {
				return err
			}
			return a.say(map[string]any{"path": args[0], "size": int64(size)}, "created %s, %v, empty\n", args[0], size)
		},
	})
	return disk
}
