package eventlog

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"redoubt.dev/redoubt/lab/debian"
)

// toolPCRs is what tpm2_eventlog computes from a log.
func toolPCRs(t *testing.T, log []byte) map[string]map[uint32]string {
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(file, log, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := root.Command(t.Context(), "tpm2_eventlog", file).Output()
	if err != nil {
		t.Fatalf("tpm2_eventlog: %v\n%s", err, out)
	}
	var doc struct {
		PCRs map[string]map[uint32]yaml.Node `yaml:"pcrs"`
	}
	if err := yaml.Unmarshal(out, &doc); err != nil {
		t.Fatal(err)
	}
	pcrs := make(map[string]map[uint32]string)
	for bank, m := range doc.PCRs {
		pcrs[bank] = make(map[uint32]string)
		for i, v := range m {
			pcrs[bank][i] = strings.TrimPrefix(v.Value, "0x") // as written: YAML would make it a number
		}
	}
	return pcrs
}

// tpm2_eventlog accepts our logs and computes the registers we compute.
func TestAgainstTPM2Tools(t *testing.T) {
	boot := bootEvents(t)
	for name, c := range map[string]struct {
		log   []byte
		banks int
	}{
		"crypto-agile":     {encode(t, boot), 4},
		"startup locality": {encode(t, append([]Event{locality(3)}, boot...)), 4},
		"SHA-1":            {sha1Log(boot), 1},
	} {
		events, err := Parse(c.log)
		if err != nil {
			t.Fatal(err)
		}
		ours, err := Replay(events)
		if err != nil {
			t.Fatal(err)
		}
		theirs := toolPCRs(t, c.log)
		n := 0
		for _, bank := range ours.BankIDs() {
			for _, pcr := range ours.Indexes(bank) {
				n++
				if name == "startup locality" && pcr == 0 {
					continue // tpm2-tools 5.4 starts from zero whatever the log says
				}
				if want := theirs[AlgorithmName(bank)][pcr]; want != hex.EncodeToString(ours[bank][pcr]) {
					t.Errorf("%s: PCR %d of %s: ours %x, tpm2_eventlog's %s", name, pcr, AlgorithmName(bank), ours[bank][pcr], want)
				}
			}
		}
		if want := 10 * c.banks; n != want {
			t.Errorf("%s: %d registers compared, want %d", name, n, want)
		}
	}
}
