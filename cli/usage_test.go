package cli

import (
	"bytes"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

// said is what a command line does where nothing runs.
func said(t *testing.T, args ...string) (status int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	a := &app{in: strings.NewReader(""), out: &o, err: &e}
	dir := t.TempDir()
	status = a.main(t.Context(), append([]string{"--run-dir", dir, "--state-dir", dir}, args...))
	return status, o.String(), e.String()
}

// mistake checks that a command line is refused as the caller's mistake, with one line that holds want.
func mistake(t *testing.T, want string, args ...string) {
	t.Helper()
	status, out, errs := said(t, args...)
	if status != 2 || out != "" || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 {
		t.Errorf("redoubt %s: exit status %d, %q, %q; want 2 and one line with %q", strings.Join(args, " "), status, out, errs, want)
	}
}

// TestMistyped: no command takes for done what it does not know.
func TestMistyped(t *testing.T) {
	junk := slices.Repeat([]string{"craete"}, 12)
	var walk func(c *cobra.Command, path []string)
	walk = func(c *cobra.Command, path []string) {
		mistake(t, "redoubt", slices.Concat(path, junk)...)
		mistake(t, "--frobnicate", slices.Concat(path, []string{"--frobnicate"})...)
		if status, out, errs := said(t, slices.Concat(path, []string{"--help"})...); status != 0 || out == "" || errs != "" {
			t.Errorf("%v --help: exit status %d: %s", path, status, errs)
		}
		if c.HasSubCommands() && c.HasParent() && c.Name() != "attest" { // which is a command, too
			mistake(t, "give ", path...)
			mistake(t, `no command "frobnicate": give `, slices.Concat(path, []string{"frobnicate", "--any", "x"})...)
		}
		for _, below := range c.Commands() {
			walk(below, slices.Concat(path, []string{below.Name()}))
		}
	}
	walk((&app{out: io.Discard, err: io.Discard}).root(), nil)

	for line, want := range map[string]string{
		"frobnicate":             `redoubt: no command "frobnicate": see ` + "`redoubt --help`",
		"frobnicate --memory 5":  `redoubt: no command "frobnicate"`,
		"sotp web":               `did you mean stop?`,
		"tenant remove acme":     `redoubt tenant: no command "remove": give list, rm or set: see ` + "`redoubt tenant --help`",
		"disk craete x 10GiB":    `redoubt disk: no command "craete": did you mean create? see`,
		"audit":                  "redoubt audit: give exposed or verify",
		"audit verfy":            "did you mean verify?",
		"image":                  "redoubt image: give cat, check, hash, ls or stat",
		"baseline frobnicate":    "give accept, create,",
		"run a b":                "redoubt run: accepts at most 1 arg(s), received 2: see `redoubt run --help`",
		"events a b":             "see `redoubt events --help`",
		"help frobnicate":        `no command "frobnicate"`,
		"help disk craete":       "did you mean create?",
		"help ps web":            `redoubt ps: no command "web"`,
		"completion frobnicate":  "give bash, fish, powershell or zsh",
		"tenant --frobnicate rm": "unknown flag: --frobnicate: see `redoubt tenant",
	} {
		mistake(t, want, strings.Fields(line)...)
	}
	for _, line := range []string{"", "help", "help disk create", "completion bash", "--version"} {
		if status, out, errs := said(t, strings.Fields(line)...); status != 0 || out == "" || errs != "" {
			t.Errorf("redoubt %s: exit status %d, %q", line, status, errs)
		}
	}
}

// TestDurations: none is another one by the time it reaches the API.
func TestDurations(t *testing.T) {
	for line, flag := range map[string]string{
		"stop web --grace":                 "--grace",
		"down --grace":                     "--grace",
		"down --timeout":                   "--timeout",
		"run web --unsafe-vtpm-delay":      "--unsafe-vtpm-delay",
		"run web.yaml --unsafe-poll":       "--unsafe-poll",
		"run --name web --unsafe-poll":     "--unsafe-poll",
		"--tenant acme stop other --grace": "--grace",
	} {
		for _, d := range []string{"-1s", "-1us", "1193h2m47.296s", "1200000h"} {
			mistake(t, flag+" "+d[:2], append(strings.Fields(line), d)...)
		}
	}
	mistake(t, "--timeout 0s", "down", "--timeout", "0s")
	for d, want := range map[time.Duration]uint32{0: 0, time.Second: 1000, maxDuration: 1<<32 - 1} {
		if ms, err := milliseconds("grace", d); err != nil || ms != want {
			t.Errorf("%v: %d ms, %v", d, ms, err)
		}
	}
	for _, line := range []string{"down", "down --grace 0s --timeout 1ms"} {
		if status, _, errs := said(t, strings.Fields(line)...); status != 0 {
			t.Errorf("%s: exit status %d: %s", line, status, errs)
		}
	}
}

// TestSpecFlags: beside a spec or a guest's name no flag is passed over.
func TestSpecFlags(t *testing.T) {
	flags := (&app{out: io.Discard, err: io.Discard}).runCommand().LocalFlags().FlagUsages()
	var all []string
	for _, m := range regexp.MustCompile(`(?m)^ +(?:-., )?--([a-z-]+)`).FindAllStringSubmatch(flags, -1) {
		all = append(all, m[1])
	}
	// These are of the start, not of the guest; hidden ones too.
	others := []string{"wait", "unsafe-no-gate"}
	if got, want := len(all), len(guestFlags)+len(others); got != want {
		t.Errorf("run has %d flags, of which %d are a guest's and %d the start's: %v", got, len(guestFlags), len(others), all)
	}
	for _, name := range all {
		if slices.Contains(others, name) {
			continue
		}
		want := "--" + name + " goes with --name"
		if name == "name" {
			want = "not both"
		}
		flag := "--" + name + "=1"
		if name == "no-tpm" {
			flag = "--no-tpm"
		}
		for _, what := range []string{"web", "web.yaml", "-"} {
			mistake(t, want, "run", what, flag)
		}
	}
	for _, line := range []string{"run web", "run web --json", "run web --unsafe-no-gate --unsafe-vtpm-delay 1s --unsafe-vtpm-first --unsafe-poll 5ms"} {
		if _, err := command(t, &server{}, strings.Fields(line)...); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
}
