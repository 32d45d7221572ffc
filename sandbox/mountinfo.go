package sandbox

import (
	"slices"
	"strings"
)

// A MountPoint is a line of /proc/PID/mountinfo, proc_pid_mountinfo(5).
type MountPoint struct {
	Target  string
	Type    string
	Options []string // per mount: ro, nosuid, nodev, noexec, …

	root         string
	superOptions []string
}

func parseMount(line string) (m MountPoint, ok bool) {
	left, right, ok := strings.Cut(line, " - ")
	f, g := strings.Fields(left), strings.Fields(right)
	if !ok || len(f) < 6 || len(g) < 3 {
		return m, false
	}
	return MountPoint{
		Target: unescape(f[4]), Type: g[0], Options: strings.Split(f[5], ","),
		root: unescape(f[3]), superOptions: strings.Split(g[2], ","),
	}, true
}

var unescaper = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescape(s string) string { return unescaper.Replace(s) }

func hasOption(options []string, o string) bool { return slices.Contains(options, o) }
