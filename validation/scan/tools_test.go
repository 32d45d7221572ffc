package scan

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
)

// mkfsConfig makes mke2fs do the same on every host.
const mkfsConfig = `[defaults]
	base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
	inode_ratio = 4096
[fs_types]
	ext2 = {
		features = ^has_journal
	}
	ext3 = {
		features = has_journal
	}
	ext4 = {
		features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
	}
`

var configPath string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "scan")
	if err != nil {
		panic(err)
	}
	configPath = filepath.Join(dir, "mke2fs.conf")
	if err := os.WriteFile(configPath, []byte(mkfsConfig), 0o600); err != nil {
		panic(err)
	}
	status := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(status)
}

// tool is a program of e2fsprogs: from the cache, or the host's.
func tool(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	cmd := program(ctx, name, args)
	if cmd == nil {
		t.Fatalf("%s (Debian: e2fsprogs, mtools) is neither in the cache nor on this host: run `make fetch`", name)
	}
	cmd.Env = append(cmd.Env, "MKE2FS_CONFIG="+configPath, "DEBUGFS_PAGER=cat", "PAGER=cat", "TZ=UTC", "LC_ALL=C")
	return cmd
}

func program(ctx context.Context, name string, args []string) *exec.Cmd {
	if root, err := debian.Open(); err == nil {
		if cmd := root.Command(ctx, name, args...); exists(cmd.Path) {
			return cmd
		}
	}
	path, err := exec.LookPath(name)
	for _, d := range []string{"/usr/sbin", "/sbin"} {
		if err != nil && exists(filepath.Join(d, name)) {
			path, err = filepath.Join(d, name), nil
		}
	}
	if err != nil {
		return nil
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = os.Environ()
	return cmd
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// must runs a program.
func must(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := tool(t, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out[max(0, len(out)-3000):])
	}
	return string(out)
}

// debugfs carries out commands on an image and returns what it said was wrong with them.
func debugfs(t testing.TB, image string, commands ...string) string {
	t.Helper()
	script := filepath.Join(t.TempDir(), "commands")
	put(t, script, []byte(strings.Join(commands, "\n")+"\n"))
	cmd := tool(t, "debugfs", "-w", "-f", script, image)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("debugfs: %v: %s", err, errs.String())
	}
	_, said, _ := strings.Cut(strings.TrimSpace(errs.String()), "\n") // the first line is its version
	return said
}

// repair has e2fsck replay the journal and mend what is wrong.
func repair(t testing.TB, image string) {
	t.Helper()
	cmd := tool(t, "e2fsck", "-fy", image)
	if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 1 {
		t.Fatalf("e2fsck -fy: %v\n%s", err, out)
	}
}

func put(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func load(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func soak() bool { return os.Getenv("REDOUBT_SOAK") != "" }
