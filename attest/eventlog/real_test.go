package eventlog

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
)

// Logs of real machines, physical and virtual, that the module go-eventlog carries for its own
// tests: it must find that they give the registers we compute. Unlike tpm2_eventlog it knows
// StartupLocality.
func TestRealLogs(t *testing.T) {
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/google/go-eventlog").Output()
	if err != nil {
		t.Fatalf("find the module: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), "testdata/eventlogs/tpm/*.bin"))
	if err != nil || len(files) < 10 {
		t.Fatalf("%d logs, %v", len(files), err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(file)
		l, err := ParseLog(b)
		if err != nil || l.Size != len(b) {
			t.Errorf("%s: %d of %d bytes: %v", name, l.Size, len(b), err)
			continue
		}
		pcrs, err := Replay(l.Events)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, bank := range pcrs.BankIDs() {
			hash, err := bank.Hash()
			if err != nil {
				t.Fatal(err)
			}
			var mrs []register.MR
			for _, i := range pcrs.Indexes(bank) {
				mrs = append(mrs, register.PCR{Index: int(i), Digest: pcrs[bank][i], DigestAlg: hash})
			}
			if _, err := tcg.ParseAndReplay(b, mrs, tcg.ParseOpts{AllowPadding: true}); err != nil {
				t.Errorf("%s: %s: %v", name, AlgorithmName(bank), err)
			}
			mrs[0] = register.PCR{Index: mrs[0].Idx(), Digest: make([]byte, hash.Size()), DigestAlg: hash}
			if _, err := tcg.ParseAndReplay(b, mrs, tcg.ParseOpts{AllowPadding: true}); err == nil {
				t.Errorf("%s: %s: the oracle takes any register", name, AlgorithmName(bank))
			}
		}
	}
}
