package scan

import (
	"errors"
	"fmt"
	"io"

	"redoubt.dev/redoubt/validation/ext4"
	"redoubt.dev/redoubt/validation/partition"
)

// volumeName is what a volume of a disk is called.
func volumeName(s *Source, t *partition.Table, p *partition.Partition) string {
	if t.Scheme == partition.Bare {
		return fmt.Sprintf("disk%d", s.Disk)
	}
	return fmt.Sprintf("disk%dp%d", s.Disk, p.Number)
}

// ErrVolume says that a file system is not there, or is not the only one.
var ErrVolume = errors.New("no such volume")

// OpenExt opens the ext2, ext3 or ext4 file system of a name; without a name the only one there is, whose name it returns.
// Disks that cannot be read have none.
func OpenExt(sources []Source, name string, o Options) (*ext4.FS, string, error) {
	var found *partition.Partition
	var of *Source
	in := ""
	for i := range sources {
		s := &sources[i]
		table, err := partition.Read(s.Reader, s.Size, partition.Options{})
		if err != nil {
			continue
		}
		for k := range table.Partitions {
			p := &table.Partitions[k]
			v := volumeName(s, table, p)
			if p.Content != partition.Ext || name != "" && v != name {
				continue
			}
			if found != nil {
				return nil, "", fmt.Errorf("%w: there are several ext file systems, such as %s and %s: say which", ErrVolume, in, v)
			}
			found, of, in = p, s, v
		}
	}
	if found == nil {
		if name == "" {
			name = "any"
		}
		return nil, "", fmt.Errorf("%w: %.40q is no ext2, ext3 or ext4 file system of the guest's", ErrVolume, name)
	}
	f, err := ext4.Open(io.NewSectionReader(of.Reader, found.Offset, found.Bytes), found.Bytes, ext4.Options{MaxMemory: o.MaxMemory})
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", in, err)
	}
	return f, in, nil
}
