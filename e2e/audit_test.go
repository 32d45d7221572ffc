package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/audit"
)

// TestAuditQEMU: the log of a run in which services die verifies, has what was done and by whom,
// and names whom each instance of a service concerned; and whatever is done to it is found.
func TestAuditQEMU(t *testing.T) {
	begin := moment()
	h := newHost(t)
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "8MiB")
	h.start(start{name: "stored", emulator: "qemu", what: "deaf", args: []string{"--disk", disk}})
	h.start(start{name: "diskless", emulator: "qemu", what: "deaf"})
	h.await("stored", "READY", 2*bootTime)
	next := h.followEvents("stored")
	before := moment()
	h.kill("BlkBack", "redoubt-blkback")
	next("storage", time.Minute)
	h.killStore()
	after := moment()
	h.await("diskless", "READY", 2*bootTime)
	h.must("attest", "stored")
	ctx, cancel := context.WithTimeout(t.Context(), bootTime)
	defer cancel()
	out, end := h.stream(ctx, "console", "stored")
	if _, err := out.Read(make([]byte, 1)); err != nil { // it is attached once it prints
		t.Error(err)
	}
	end()
	for _, name := range []string{"stored", "diskless"} {
		h.must("stop", name, "--grace", "0s")
		h.must("rm", name)
	}
	downed := moment()

	h.must("audit", "verify")
	var report struct {
		Whole   bool       `json:"whole"`
		Records uint64     `json:"records"`
		Head    audit.Head `json:"head"`
	}
	if err := json.Unmarshal([]byte(h.must("audit", "verify", "--json")), &report); err != nil || !report.Whole || report.Records < 30 {
		t.Errorf("%+v %v", report, err)
	}
	var got []string
	for r, err := range audit.Records(h.path("state", audit.Dir)) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.Join([]string{r.Actor.Service, r.Act, r.Object, string(r.Outcome), r.Detail["service"] + r.Detail["to"]}, " "))
		if r.Actor.Service == "toolstack" && r.Detail["uuid"] != "" && int(r.Actor.UID) != os.Getuid() {
			t.Errorf("%s %s was asked for by uid %d", r.Act, r.Object, r.Actor.UID)
		}
	}
	if !slices.Contains(got, "builder instance-start toolstack done ") { // beside the vTPM service, in any order
		t.Errorf("no toolstack: %q", got)
	}
	at := 0
	for _, want := range []string{
		"builder audit-begin audit log done ", "builder instance-start builder done ", "builder instance-start bootstrapper done ",
		"builder instance-start store-state done ", "builder instance-start vtpm done ", "builder instance-end bootstrapper done ",
		"toolstack build stored asked ", "builder instance-start blkback done ", "builder link stored done blkback",
		"builder hand-over stored done blkback", "builder link stored done store-state", "builder link stored done vtpm",
		"builder instance-start emulator done ", "builder link stored done emulator", "builder hand-over stored done emulator", "builder hand-over stored done qemu",
		"toolstack build stored done ", "toolstack build diskless asked ", "toolstack build diskless done ",
		"builder instance-end blkback done ", "builder instance-start blkback done ", "builder link stored done blkback",
		"builder instance-end store-state done ", "builder instance-start store-state done ",
		"toolstack quote stored done ", "toolstack attach-console stored done ",
		"toolstack stop stored asked ", "builder guest-end stored done ", "toolstack stop stored done ", "toolstack destroy stored done ",
		"toolstack stop diskless asked ", "builder guest-end diskless done ",
	} {
		i := slices.Index(got[at:], want)
		if i < 0 {
			t.Fatalf("no %q after record %d of\n%s", want, at, strings.Join(got, "\n"))
		}
		at += i + 1
	}

	for _, c := range []struct {
		service, from, to string
		want              map[string]int // instances by guest
	}{
		{"blkback", before, after, map[string]int{"stored": 2}}, // the one that was killed and its successor
		{"blkback", after, after, map[string]int{"stored": 1}},
		{"redoubt-blkback", downed, "now", map[string]int{}},
		{"store", before, after, map[string]int{"stored": 2, "diskless": 2}},
		{"vtpm", before, "now", map[string]int{"stored": 1, "diskless": 1}},
		{"emulator", after, after, map[string]int{"stored": 1, "diskless": 1}},
		{"pciback", after, "now", map[string]int{}},
		{"pciback", begin, "now", map[string]int{"stored": 1, "diskless": 1}},
	} {
		var list []struct{ Guest, Instance string }
		if err := json.Unmarshal([]byte(h.must("audit", "exposed", "--service", c.service, "--from", c.from, "--to", c.to, "--json")), &list); err != nil {
			t.Fatal(err)
		}
		seen := map[string]map[string]bool{}
		for _, e := range list {
			if seen[e.Guest] == nil {
				seen[e.Guest] = map[string]bool{}
			}
			seen[e.Guest][e.Instance] = true
		}
		for g, n := range c.want {
			if len(seen[g]) != n {
				t.Errorf("%s from %s to %s: %d instances concerned %s, want %d", c.service, c.from, c.to, len(seen[g]), g, n)
			}
		}
		if len(seen) != len(c.want) {
			t.Errorf("%s from %s to %s: %v", c.service, c.from, c.to, list)
		}
	}
	if out := h.must("audit", "exposed", "--service", "blkback", "--from", before); !strings.Contains(out, "stored") || strings.Contains(out, "diskless") {
		t.Errorf("in words:\n%s", out)
	}
	h.fails(2, "is no time", "audit", "exposed", "--service", "blkback", "--from", "yesterdayish")
	tampered(t, h, report.Head)
}

func moment() string { return time.Now().Format(time.RFC3339Nano) }

// tampered changes copies of the log.
func tampered(t *testing.T, h *host, head audit.Head) {
	for name, c := range map[string]struct {
		do   func([]byte) []byte
		want string
	}{
		"edit": {func(b []byte) []byte { return bytes.Replace(b, []byte(`"stored"`), []byte(`"forged"`), 1) }, "edited"},
		"cut":  {func(b []byte) []byte { return b[:bytes.LastIndexByte(b[:len(b)-1], '\n')+1] }, "tail cut"},
		"order": {func(b []byte) []byte {
			l := bytes.SplitAfter(b, []byte("\n"))
			l[3], l[4] = l[4], l[3]
			return bytes.Join(l, nil)
		}, "reordered"},
	} {
		state := filepath.Join(t.TempDir(), "state")
		if err := os.MkdirAll(state, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(filepath.Join(state, audit.Dir), os.DirFS(h.path("state", audit.Dir))); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(h.path("state", audit.AnchorFile))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(state, audit.AnchorFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		h.must("audit", "verify", "--state-dir", state, "--head", headFlag(head))
		log := filepath.Join(state, audit.Dir, "00000000000000000001.log")
		if b, err = os.ReadFile(log); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(log, c.do(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := h.run("audit", "verify", "--state-dir", state); r.status != 1 || !strings.Contains(r.out, c.want) {
			t.Errorf("%s: exit status %d, want 1 and %q\n%s%s", name, r.status, c.want, r.out, r.err)
		}
	}
	// The log as it is, and somebody's head of another one.
	head.Seq, head.Hash[0] = head.Seq-1, head.Hash[0]^1
	if r := h.run("audit", "verify", "--head", headFlag(head)); r.status != 1 || !strings.Contains(r.out, "other log") {
		t.Errorf("another head: exit status %d\n%s%s", r.status, r.out, r.err)
	}
}

func headFlag(h audit.Head) string {
	b, _ := json.Marshal(h.Seq)
	return string(b) + ":" + h.Hash.String()
}

// TestAuditDamagedAtStart: Redoubt starts over a damaged log, keeps it, and the operator is told
// until it was taken away.
func TestAuditDamagedAtStart(t *testing.T) {
	h := newDownHost(t)
	h.fails(1, "no log", "audit", "verify")
	h.must("up")
	h.must("down")
	log := h.path("state", audit.Dir, "00000000000000000001.log")
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(log, bytes.Replace(b, []byte("vtpm"), []byte("VTPM"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := h.run("audit", "verify"); r.status != 1 {
		t.Errorf("exit status %d", r.status)
	}
	h.must("up")
	defer h.must("down")
	r := h.run("audit", "verify")
	if r.status != 1 || !strings.Contains(r.out, audit.DamagedPrefix) || !strings.Contains(r.out, "whole: ") {
		t.Errorf("exit status %d\n%s", r.status, r.out)
	}
	aside, err := filepath.Glob(h.path("state", audit.DamagedPrefix+"*"))
	if err != nil || len(aside) != 1 {
		t.Fatalf("%v %v", aside, err)
	}
	if err := os.Rename(aside[0], h.path("evidence")); err != nil {
		t.Fatal(err)
	}
	h.must("audit", "verify")
}
