package cli

import (
	"github.com/spf13/cobra"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/spec"
)

func (a *app) diskCommand() *cobra.Command {
	disk := &cobra.Command{Use: "disk", Short: "Disk images"}
	var base string
	create := &cobra.Command{
		Use:   "create PATH SIZE | create --base BASE PATH",
		Short: "Create an empty raw image, or an overlay over one; an existing file is left alone",
		Long: `Creates an empty raw image. With --base it creates an overlay: a disk that begins as the base,
which is only read and may be that of many overlays. From then on the base must not change. An overlay
takes space for what is written to it. Copy it with redoubt disk copy: cp and others make holes of
zeros, which would uncover the base there. Copy a base with cp -p: it is known by its size and the
time of its last change.`,
		Example: "  redoubt disk create web-1.img 10GiB\n  redoubt disk create --base debian.img web-2.img",
		Args: func(c *cobra.Command, args []string) error {
			if base != "" {
				return names(1, "a path: the size is the base's")(c, args)
			}
			return names(2, "a path and a size")(c, args)
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if base != "" {
				size, err := block.CreateOverlay(args[0], base)
				if err != nil {
					return err
				}
				return a.say(map[string]any{"path": args[0], "base": base, "size": size}, "created %s, %v, over %s\n", args[0], spec.Size(size), base)
			}
			size, err := spec.ParseSize(args[1])
			if err != nil {
				return usagef("disk create: %v", err)
			}
			if err := block.Create(args[0], int64(size)); err != nil {
				return err
			}
			return a.say(map[string]any{"path": args[0], "size": int64(size)}, "created %s, %v, empty\n", args[0], size)
		},
	}
	create.Flags().StringVar(&base, "base", "", "raw image that the new one is an overlay over")
	var adopt bool
	duplicate := &cobra.Command{
		Use:   "copy OVERLAY PATH",
		Short: "Copy an overlay that no guest runs on; an existing file is left alone",
		Long: `Copies an overlay, as another one over the same base. Other programs make holes of zeros, which
uncover the base there, so that their copies are refused by ` + "`redoubt run`" + `; --adopt makes an overlay of such a
copy for somebody who knows better, such as of a backup that kept zeros and holes apart.`,
		Example: "  redoubt disk copy web-1.img web-2.img",
		Args:    names(2, "an overlay and a path"),
		RunE: func(c *cobra.Command, args []string) error {
			size, err := block.CopyOverlay(c.Context(), args[1], args[0], adopt)
			if err != nil {
				return err
			}
			return a.say(map[string]any{"path": args[1], "from": args[0], "size": size}, "created %s, %v, a copy of %s\n", args[1], spec.Size(size), args[0])
		},
	}
	duplicate.Flags().BoolVar(&adopt, "adopt", false, "take a copy that something else made")
	disk.AddCommand(create, duplicate)
	return disk
}
