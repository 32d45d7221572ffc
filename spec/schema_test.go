package spec

import (
	"encoding/json"

	"github.com/invopop/jsonschema"
)

// Schema is the JSON schema of a guest spec, as published in docs/guest.schema.json. It is made
// here, among the tests, so that no program links the generator.
func Schema() ([]byte, error) {
	r := jsonschema.Reflector{RequiredFromJSONSchemaTags: true, DoNotReference: true}
	s := r.Reflect(&Guest{})
	s.ID = "https://redoubt.dev/guest.schema.json"
	s.Title = "Redoubt guest"
	b, err := json.MarshalIndent(s, "", "  ")
	return append(b, '\n'), err
}

// JSONSchema: a size is written as text or as a plain number of bytes.
func (Size) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{OneOf: []*jsonschema.Schema{
		{Type: "string", Pattern: `^[0-9]+ ?([KMGT]i?B?)?$`},
		{Type: "integer", Minimum: "0"},
	}}
}

// JSONSchema: a duration is written as text.
func (Duration) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^([0-9.]+(ms|s|m|h))+$`}
}
