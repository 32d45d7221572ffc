package crossview

import (
	"io"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/ext4"
)

// A listing does not say where another file system is mounted: below its mount point nothing is listed, as below a directory all
// of whose names a rootkit hides. So only those count as mount points that every system mounts something on, and those that the
// disk's own fstab names, which is in a baseline itself.

// usualMounts are the mount points of the kernel's own file systems, and of those in memory.
var usualMounts = []string{"/dev", "/proc", "/run", "/sys", "/tmp"}

const maxFstab = 64 << 10 // bytes

// mountPoints are the directories where something is expected to be mounted.
func mountPoints(f *ext4.FS) map[string]bool {
	all := map[string]bool{}
	for _, p := range usualMounts {
		all[p] = true
	}
	e, err := f.Follow("/etc/fstab")
	if err != nil || e.Inode.Type() != unix.S_IFREG || e.Inode.Size > maxFstab {
		return all
	}
	r, err := e.Inode.Open()
	if err != nil {
		return all
	}
	b := make([]byte, e.Inode.Size)
	if n, err := r.ReadAt(b, 0); n < len(b) && err != io.EOF { //nolint:errorlint // io.ReaderAt's own
		return all
	}
	for _, p := range parseFstab(string(b)) {
		all[p] = true
	}
	return all
}

// parseFstab reads the mount points of a file as fstab(5) describes it. What is no absolute, clean path is left out.
func parseFstab(text string) (all []string) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		p := unescape(fields[1])
		if len(p) > 1 {
			p = strings.TrimSuffix(p, "/")
		}
		if p != "/" && checkName(p) == nil {
			all = append(all, p)
		}
	}
	return all
}

// unescape undoes what fstab(5) writes for blanks in a field: \040 and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
