package attest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/attest/eventlog"
)

// A content is what a policy names instead of a register. A log's texts prove nothing: a
// content is known by its place, as the only measurement of its register (beside the separator
// of PCRs 0 to 7), and by its digest, which the quote covers.
type content struct {
	field string
	pcr   uint32 // of a guest booted by kernel
	place int    // among the host's events of PCR 13 in a firmware guest; -1: has none
}

var contents = []content{
	{"monitor", eventlog.PCRMonitor, 0},
	{"machine", eventlog.PCRMachine, 1},
	{"kernel", eventlog.PCRKernel, -1},
	{"cmdline", eventlog.PCRCmdline, -1},
	{"initrd", eventlog.PCRInitrd, -1},
	{"firmware", eventlog.PCRFirmware, 2},
}

func (c content) register(firmware bool) uint32 {
	if firmware && c.place >= 0 {
		return eventlog.PCRFirmware
	}
	return c.pcr
}

// A measured is the one measurement of a content.
type measured struct {
	event int // counted from 1 over all logs
	sum   []byte
	text  string // what was measured, where the digest bears it out; else ""
}

// errNothing says that a register holds no content.
var errNothing = errors.New("nothing was measured")

// separator is what closes PCRs 0 to 7.
var separator = sha256.Sum256(make([]byte, 4))

// find returns the measurement of a content. Precondition: the log explains the registers.
func (v *verifier) find(c content) (*measured, error) {
	firmware := v.firmware()
	if firmware && c.place < 0 {
		return nil, errors.New("the guest booted firmware, which measures what it loads in its own way: use pcrs")
	}
	pcr := c.register(firmware)
	var found []measured
	for i, e := range v.events {
		if e.PCR != pcr || e.Type == eventlog.TypeNoAction {
			continue
		}
		sum := e.Digest(tpm2.TPMAlgSHA256)
		if sum == nil { // it did not extend the bank
			continue
		}
		m := measured{event: i + 1, sum: sum}
		if data, ok := e.Measured(); ok {
			m.text = string(data)
			if e.Type == eventlog.TypeSCRTMVersion {
				m.text = e.Text()
			}
		}
		found = append(found, m)
	}
	if pcr < 8 && len(found) > 0 && bytes.Equal(found[len(found)-1].sum, separator[:]) {
		found = found[:len(found)-1]
	}
	want, at := 1, 0
	if pcr == eventlog.PCRFirmware {
		want, at = 3, c.place
	}
	switch {
	case len(found) == 0:
		return nil, errNothing
	case len(found) != want:
		return nil, fmt.Errorf("%d measurements, not %d", len(found), want)
	}
	return &found[at], nil
}

// named puts a measurement into the policy, where a policy can name it.
func (c content) named(p *Policy, m *measured) bool {
	var text *[]string
	switch c.field {
	case "kernel":
		p.Kernel = []Hash{Hash(m.sum)}
		return true
	case "initrd":
		p.Initrd = []Hash{Hash(m.sum)}
		return true
	case "firmware":
		p.Firmware = []Hash{Hash(m.sum)}
		return true
	case "monitor":
		text = &p.Monitor
	case "machine":
		text = &p.Machine
	case "cmdline":
		text = &p.Cmdline
	}
	if d := c.digest(m.text); !bytes.Equal(d[:], m.sum) || quote(m.text) != "'"+m.text+"'" {
		return false // not a text, or one that is not printable: its register is given instead
	}
	*text = []string{m.text}
	return true
}

// digest is that of a text as it is measured.
func (c content) digest(text string) Hash {
	if c.field == "monitor" {
		return sha256.Sum256(eventlog.VersionData(text))
	}
	return sha256.Sum256([]byte(text))
}

// wanted is what a policy says of a content: digests, and how to show each, in a line for a
// person and in full.
func (c content) wanted(p *Policy) (sums []Hash, shown, full []string) {
	texts := func(list []string) {
		for _, t := range list {
			sums, shown, full = append(sums, c.digest(t)), append(shown, quote(t)), append(full, t)
		}
	}
	digests := func(list []Hash) {
		for _, h := range list {
			sums, shown, full = append(sums, h), append(shown, short(h[:])), append(full, h.String())
		}
	}
	switch c.field {
	case "monitor":
		texts(p.Monitor)
	case "machine":
		texts(p.Machine)
	case "cmdline":
		texts(p.Cmdline)
	case "kernel":
		digests(p.Kernel)
	case "initrd":
		digests(p.Initrd)
	case "firmware":
		digests(p.Firmware)
	}
	return sums, shown, full
}

// checkPolicy is the last step: every field of the policy that is given must hold.
func (v *verifier) checkPolicy(p *Policy) (string, error) {
	var findings []string
	held := 0
	differs := func(d Difference, format string, args ...any) {
		findings = append(findings, fmt.Sprintf(format, args...))
		v.report.Differences = append(v.report.Differences, d)
	}
	if len(p.EK) > 0 {
		if !slices.Contains(p.EK, Hash(v.report.EK)) {
			findings = append(findings, fmt.Sprintf("EK %s: another TPM than %s", short(v.report.EK), list(p.EK)))
		} else {
			held++
		}
	}
	named := map[uint32]bool{}
	for _, c := range contents {
		sums, shown, full := c.wanted(p)
		none := c.field == "initrd" && p.NoInitrd
		if len(sums) == 0 && !none {
			continue
		}
		if none {
			shown, full = append(shown, "none"), append(full, "none")
		}
		pcr := c.register(v.firmware())
		want := choices(shown)
		m, err := v.find(c)
		switch {
		case errors.Is(err, errNothing) && none:
			held++
		case err != nil:
			named[pcr] = true
			differs(Difference{PCR: pcr, Got: err.Error(), Want: strings.Join(full, " or ")}, "%s: no %s to compare with %s: %v", registerName(pcr, v.firmware()), c.field, want, err)
		case slices.Contains(sums, Hash(m.sum)):
			held++
		default:
			got, whole := short(m.sum), fmt.Sprintf("%x", m.sum)
			if c.textual() && m.text != "" {
				got, whole = quote(m.text), m.text
			}
			named[pcr] = true
			differs(Difference{PCR: pcr, Event: m.event, Got: whole, Want: strings.Join(full, " or ")}, "%s: event %d %s is not %s", registerName(pcr, v.firmware()), m.event, got, want)
		}
	}
	for _, pcr := range p.pcrList() {
		got := Hash(v.e.PCRs[pcr])
		if slices.Contains(p.PCRs[pcr], got) {
			held++
			continue
		}
		if !named[pcr] { // else the line above says more
			var full []string
			for _, h := range p.PCRs[pcr] {
				full = append(full, h.String())
			}
			differs(Difference{PCR: pcr, Got: got.String(), Want: strings.Join(full, " or ")}, "%s: %s is not %s%s", registerName(pcr, v.firmware()), short(got[:]), list(p.PCRs[pcr]), v.history(pcr))
		}
	}
	if len(findings) > 0 {
		return "", brief(findings)
	}
	return fmt.Sprintf("%d of %d values are as the policy says", held, held), nil
}

// textual reports whether a policy gives the content as text.
func (c content) textual() bool {
	return c.field == "monitor" || c.field == "machine" || c.field == "cmdline"
}

// history names the events behind a register, for a reader who has no more than its value.
func (v *verifier) history(pcr uint32) string {
	const shown = 3
	var out []string
	for i, e := range v.events {
		if e.PCR != pcr || e.Type == eventlog.TypeNoAction {
			continue
		}
		text := short(e.Digest(tpm2.TPMAlgSHA256))
		if data, ok := e.Measured(); ok && e.Type != eventlog.TypeSeparator {
			text = quote(string(data))
		}
		if len(out) == shown {
			return " (events " + strings.Join(out, ", ") + ", …)"
		}
		out = append(out, fmt.Sprintf("%d %s", i+1, text))
	}
	if len(out) == 0 {
		return ""
	}
	return " (events " + strings.Join(out, ", ") + ")"
}

// quote shows a text of a log or policy in quotation marks, cut where it is long; what is not
// printable is shown as hexadecimal.
func quote(s string) string {
	const most = 2 << 10 // a kernel command line fits
	s = eventlog.Event{Type: eventlog.TypeIPL, Data: []byte(s)}.Text()
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return "'" + s + "'"
}

func list(sums []Hash) string {
	var out []string
	for _, h := range sums {
		out = append(out, short(h[:]))
	}
	return choices(out)
}

// choices joins what would be good.
func choices(shown []string) string {
	const most = 3
	if n := len(shown) - most; n > 0 {
		shown = append(slices.Clone(shown[:most]), fmt.Sprintf("%d more", n))
	}
	return strings.Join(shown, " or ")
}
