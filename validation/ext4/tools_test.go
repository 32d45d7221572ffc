package ext4

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

// tool is a program of e2fsprogs: from the cache, or the host's.
func tool(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var cmd *exec.Cmd
	if root, err := debian.Open(); err == nil {
		if cmd = root.Command(ctx, name, args...); !exists(cmd.Path) {
			cmd = nil
		}
	}
	if cmd == nil {
		path, err := exec.LookPath(name)
		if err != nil {
			for _, d := range []string{"/usr/sbin", "/sbin"} {
				if exists(filepath.Join(d, name)) {
					path, err = filepath.Join(d, name), nil
				}
			}
		}
		if err != nil {
			t.Fatalf("%s (Debian: e2fsprogs) is neither in the cache nor on this host: run `make fetch`", name)
		}
		cmd = exec.CommandContext(ctx, path, args...)
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "MKE2FS_CONFIG="+config(t), "DEBUGFS_PAGER=cat", "PAGER=cat", "TZ=UTC", "LC_ALL=C")
	return cmd
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

var configPath string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "ext4")
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

func config(testing.TB) string { return configPath }

// must runs a program of e2fsprogs and returns what it said on standard output.
func must(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := tool(t, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, tail(out.String()), tail(errs.String()))
	}
	return out.String()
}

func tail(s string) string { return s[max(0, len(s)-3000):] }

// debugfs carries out commands on an image, writing to it.
func debugfs(t testing.TB, image string, commands ...string) string {
	t.Helper()
	return debugfsMode(t, []string{"-w"}, image, commands)
}

// ask carries out commands that only read.
func ask(t testing.TB, image string, commands ...string) string {
	t.Helper()
	return debugfsMode(t, []string{"-c"}, image, commands)
}

func debugfsMode(t testing.TB, flags []string, image string, commands []string) string {
	t.Helper()
	script := filepath.Join(t.TempDir(), "commands")
	write(t, script, []byte(strings.Join(commands, "\n")+"\n"))
	cmd := tool(t, "debugfs", append(flags, "-f", script, image)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("debugfs: %v: %s", err, errs.String())
	}
	said := strings.Split(strings.TrimSpace(errs.String()), "\n")
	if len(said) > 1 { // the first line is its version
		t.Fatalf("debugfs: %s", tail(strings.Join(said, "\n")))
	}
	return out.String()
}

// fsck says whether an image is clean, without changing it.
func fsck(t testing.TB, image string) {
	t.Helper()
	must(t, "e2fsck", "-fn", image)
}

// repair has e2fsck replay the journal and mend what is wrong.
func repair(t testing.TB, image string, args ...string) {
	t.Helper()
	cmd := tool(t, "e2fsck", append(append([]string{"-fy"}, args...), image)...)
	if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 1 {
		t.Fatalf("e2fsck -fy: %v\n%s", err, tail(string(out)))
	}
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy.img")
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	return to
}

// open opens an image file with this package.
func open(t testing.TB, image string) *FS {
	t.Helper()
	f, err := openFile(t, image)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func openFile(t testing.TB, image string) (*FS, error) {
	t.Helper()
	file, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	st, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Open(file, st.Size(), Options{})
}

func soak() bool { return os.Getenv("REDOUBT_SOAK") != "" }
